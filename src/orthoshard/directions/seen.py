"""What a direction is made from: X = diag(rows) N diag(columns) / size, which is never formed unless asked for.

N (b, m, n) is what momentum left in place; the scales are those of equilibration, ``size`` a power of two that keeps
squares representable. So an equilibrated matrix costs two thin multiplications in place of a second full matrix.
May import torch, `linalg` and `request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg.accumulate import first_product
from ..linalg.products import Precision, thin_matmul
from ..linalg.unit import column_squares, row_squares
from .request import Asks, Sum


@dataclass
class Seen:
    """X, unformed. Local pieces; all scales have the batch first.

    N          (b, m, n)
    precision  of products of N with thin matrices, see `linalg.products`
    size       (b, 1, 1) powers of two, or None for 1
    rows       (b, m, 1), columns (b, 1, n): scales of equilibration, or None for 1
    local      (b, m, 1): squared row norms of this rank's piece of N, where a sweep had them on its way
    squares    (b, m, 1): squared row norms of N / size, finished, once somebody asked
    weights    (e, m, n) blocks of the weights themselves, for a direction that looks at them
    known      (Q, Y): what the sweep of the momentum made of Nᵀ Q or N Q, see `linalg.accumulate`
    """

    N: Tensor
    precision: Precision | None = None
    size: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    local: Tensor | None = None
    squares: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None
    weights: Sequence[Tensor] = ()

    @property
    def mT(self) -> Seen:
        """Xᵀ, for products; it knows no row norms."""
        rows, columns = (None if scale is None else scale.mT for scale in (self.columns, self.rows))
        return Seen(self.N.mT, self.precision, self.size, rows, columns, known=self.known)

    def times(self, B: Tensor) -> Tensor:
        """X B, (b, m, r), of this rank's columns; in N's dtype. B (b, n, r)."""
        scaled = B if self.columns is None else (B * self.columns.mT).to(B.dtype)
        if self.known is not None and self.known[0] is scaled:
            product = first_product(self.N, scaled, self.size, self.known[1], self.precision)
        else:
            product = thin_matmul(self.N, scaled if self.size is None else scaled / self.size, self.precision)
        return product if self.rows is None else (product * self.rows).to(product.dtype)

    def formed(self) -> Tensor:
        """X itself, (b, m, n): N where nothing scales it, else a copy."""
        formed = self.N if self.size is None else self.N / self.size
        for scale in (self.rows, self.columns):
            formed = formed if scale is None else (formed * scale).to(formed.dtype)
        return formed

    def row_squares(self) -> Asks:
        """The squared row norms of X, (b, m, 1), finished over its columns; at least in float32."""
        if self.squares is None:
            local = self.local if self.size is None else None
            local = row_squares(self.N if self.size is None else self.N / self.size) if local is None else local
            self.squares = yield Sum(local, over="columns")
        if self.columns is not None:
            return (yield Sum(row_squares(self.formed()), over="columns"))
        squares = self.squares
        assert squares is not None
        return squares if self.rows is None else squares * self.rows.square()

    def column_squares(self) -> Asks:
        """The squared column norms of N / size, (b, 1, n), finished over its rows."""
        return (yield Sum(column_squares(self.N if self.size is None else self.N / self.size), over="rows"))

    def part(self, first: int, last: int) -> Seen:
        """Matrices first..last-1 of the batch."""
        names = ("N", "size", "rows", "columns", "local", "squares")
        cut = {name: of_batch(getattr(self, name), first, last) for name in names}
        return replace(self, known=None, weights=list(_blocks_of(self.weights, first, last)), **cut)


def _blocks_of(weights: Sequence[Tensor], first: int, last: int) -> Iterator[Tensor]:
    """What matrices first..last-1 have of blocks (e, m, n) that make up a batch."""
    start = 0
    for weight in weights:
        begin, end = max(first - start, 0), min(last - start, len(weight))
        if begin < end:
            yield weight[begin:end]
        start += len(weight)


def of_batch(x: Tensor | None, first: int, last: int) -> Tensor | None:
    """A slice of a batch."""
    return None if x is None else x[first:last]


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where it is 0."""
    return torch.where(scale > 0, 1 / scale, 0)
