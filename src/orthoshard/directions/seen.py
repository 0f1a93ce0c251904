"""What a direction sees: X = diag(rows) N diag(columns) / size, which is not formed unless its entries are needed.

N (b, m, n) is what momentum left in place. The scales are those of equilibration, and ``size`` is a power of two that
keeps squares representable. So an equilibrated matrix costs two thin multiplications in place of a second full matrix.
Products of 16-bit operands need one copy of X, which the first product makes and the others use.
May import torch, `linalg` and `request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..linalg.accumulate import scaled_copy, wide_row_squares
from ..linalg.host_sync import device_type
from ..linalg.products import Precision, narrow_dtype, narrow_matmul, thin_matmul
from ..linalg.scale import power_of_two
from ..linalg.unit import column_squares, row_squares
from .request import Asks, Sum


@dataclass
class Seen:
    """X = diag(rows) N diag(columns) / size, unformed: what a direction sees. N is the momentum, or under Nesterov what
    looks ahead of it. These are this rank's pieces; all scales have the batch first.

    N          (b, m, n)
    precision  of products of N with thin matrices, see `linalg.products`
    size       (b, 1, 1) powers of two, or None for 1
    rows       (b, m, 1), columns (b, 1, n): scales of equilibration, or None for 1
    local      (b, m, 1): squared row norms of this rank's piece of N, if a sweep computed them in passing; in float64
               on a device, where no read tells whether less would hold them
    squares    (b, m, 1): squared row norms of N / size, finished, once computed
    weights    (e, m, n) blocks of the weights themselves, for a direction that reads them
    gram       (b, r, r): for a factor of a pair, its partner's Gram matrix; ``gram_side``: the side along which r lies
    turned     whether this is the transpose of what the update began with
    copies     X in 16 bits, as the update began with it, once made
    """

    N: Tensor
    precision: Precision | None = None
    size: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    local: Tensor | None = None
    squares: Tensor | None = None
    weights: Sequence[Tensor] = ()
    gram: Tensor | None = None
    gram_side: Literal["rows", "columns"] = "rows"
    turned: bool = False
    copies: list[Tensor] = field(default_factory=list)

    @property
    def mT(self) -> Seen:
        """Xᵀ, for products; without row norms."""
        rows, columns = (None if scale is None else scale.mT for scale in (self.columns, self.rows))
        return Seen(self.N.mT, self.precision, self.size, rows, columns, turned=not self.turned, copies=self.copies)

    def times(self, B: Tensor) -> Tensor:
        """Return X B, (b, m, r), from this rank's columns; in N's dtype. B (b, n, r)."""
        if (narrow := narrow_dtype(self.N.dtype, device_type(self.N), self.precision)) is not None:
            return narrow_matmul(self._copy(narrow), B)
        scaled = B if self.columns is None else (B * self.columns.mT).to(B.dtype)
        size, rest = self.size, None
        if size is not None and self.columns is not None:
            # for a denormal N both are large, and their product overflows float32: split the size's exponent in half
            rest = size / power_of_two(size.sqrt())
            size = size / rest
        product = thin_matmul(self.N, scaled if size is None else scaled / size, self.precision)
        product = product if rest is None else product / rest
        return product if self.rows is None else (product * self.rows).to(product.dtype)

    def _copy(self, dtype: torch.dtype) -> Tensor:
        """Return X in ``dtype``."""
        if not self.copies:
            begun = self.mT if self.turned else self
            copied, scale = begun.N, begun.rows
            if begun.columns is not None:
                copied, scale = copied if scale is None else copied * scale, begun.columns
            if begun.size is not None:
                # the product of the two may overflow float32
                scale = begun.size.reciprocal() if scale is None else scale.double() / begun.size
            self.copies.append(copied.to(dtype) if scale is None else scaled_copy(copied, scale, dtype))
        return self.copies[0].mT if self.turned else self.copies[0]

    def formed(self, sized: bool = True) -> Tensor:
        """Return X itself, (b, m, n). If nothing scales it, this is N, which must not be written; otherwise it is a
        copy. ``sized=False`` leaves out the division by ``size``, for callers to which the
        size of X does not matter."""
        formed = self.N if self.size is None or not sized else self.N / self.size
        for scale in (self.rows, self.columns):
            formed = formed if scale is None else (formed * scale).to(formed.dtype)
        return formed

    def row_squares(self) -> Asks:
        """Return the squared row norms of X, (b, m, 1), finished over its columns; at least in float32."""
        if self.squares is None:
            self.squares = yield Sum(self._local(), over="columns")
        if self.columns is not None:
            return (yield Sum(row_squares(self.formed()), over="columns"))
        squares = self.squares
        assert squares is not None
        return squares if self.rows is None else squares * self.rows.square()

    def _local(self) -> Tensor:
        """Return the squared row norms of this rank's piece of N / size, at least in float32."""
        if self.size is None:
            return row_squares(self.N) if self.local is None else self.local
        if self.N.dtype == torch.float64:
            return row_squares(self.N / self.size)
        local = self.local
        if local is None or local.dtype != torch.float64:  # squares may need float64
            local = wide_row_squares(self.N)
        return (local / self.size / self.size).float()

    def column_squares(self) -> Asks:
        """Return the squared column norms of X, (b, 1, n), finished over its rows."""
        return (yield Sum(column_squares(self.formed()), over="rows"))

    def part(self, first: int, last: int) -> Seen:
        """Return matrices first..last-1 of the batch."""
        names = ("N", "size", "rows", "columns", "local", "squares", "gram")
        cut = {name: None if (x := getattr(self, name)) is None else x[first:last] for name in names}
        return replace(self, copies=[], weights=list(_blocks_of(self.weights, first, last)), **cut)


def _blocks_of(weights: Sequence[Tensor], first: int, last: int) -> Iterator[Tensor]:
    """Yield what matrices first..last-1 have of blocks (e, m, n) that make up a batch."""
    start = 0
    for weight in weights:
        begin, end = max(first - start, 0), min(last - start, len(weight))
        if begin < end:
            yield weight[begin:end]
        start += len(weight)


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 if it is 0."""
    return torch.where(scale > 0, 1 / scale, 0)
