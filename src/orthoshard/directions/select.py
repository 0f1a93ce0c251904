"""Dion3's direction: the polar factor of the rows with the largest momentum (arXiv 2608.11612, also called NorDion2).

    K = the ceil(f s) rows of largest l1 norm, or columns if these are fewer; s = min(m, n)
    U_K = polar(N_K), the other rows of U are 0
    with error feedback  M_K <- mu M_K afterwards, the other rows stay
    the learning rate is multiplied by 1 / sqrt(f)

N (b, m, n). f = 1 is Muon (with the row moment NorMuon). Norms are finished sums in float64, rounded to float32 before
they are compared, and of equal rows the first is taken. So K does not depend on how the matrix is sharded.
May import torch, `linalg`, `checks` and this room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import fraction
from ..linalg.small import Work, at_once
from .polar import Polar
from .proposal import Proposal
from .request import Asks, OnWholeMatrices, Sum
from .seen import Seen


@dataclass(frozen=True)
class Select(Polar):
    """Options of Dion3. ``fraction`` is f; the paper uses 1/4 and 1/8."""

    withholds: ClassVar[bool] = True

    fraction: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("fraction", self.fraction, zero=False, one=True)

    def size(self, shape: tuple[int, ...]) -> float:
        return 1 / math.sqrt(self.fraction)

    def of_rows(self, shape: tuple[int, ...]) -> bool:
        """Return whether rows of an (m, n) matrix are selected, rather than columns."""
        m, n = shape
        return m <= n

    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks:
        m, n = shape
        rows = self.of_rows(shape)
        count, X = math.ceil(self.fraction * (m if rows else n)), seen.formed()
        norms = torch.linalg.vector_norm(X, 1, dim=-1 if rows else -2, dtype=torch.float64).unsqueeze(-1)
        norms = yield Sum(norms, over="columns" if rows else "rows")
        first = at_once(partial(_largest, count=count))
        chosen = yield OnWholeMatrices(first, norms.float(), over="rows" if rows else "columns")
        selected = chosen if rows else chosen.mT
        part = (count, n) if rows else (m, count)
        iterate = self.factor(part, X)
        U = yield OnWholeMatrices(partial(_of_part, iterate, rows, count), (X * selected).to(X.dtype), over="both")
        return Proposal(full=U, selected=selected)


def _largest(norms: Tensor, count: int) -> Tensor:
    """Return 1 for the ``count`` largest of each column of norms (b, s, 1), the first of equal
    ones, and 0 for the others."""
    order = norms.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(norms).scatter_(1, order, 1.0)


def _of_part(iterate: Callable[[Tensor], Work], rows: bool, count: int, X: Tensor) -> Work:
    """Compute the polar factor of those rows, or columns, of X (b, m, n) that are not zero, and
    return it at their places."""
    dim = 1 if rows else 2
    norms = torch.linalg.vector_norm(X, 1, dim=3 - dim)
    places = norms.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    index = places.unsqueeze(3 - dim).expand(-1, *((-1, X.shape[2]) if rows else (X.shape[1], -1)))
    part = yield from iterate(X.gather(dim, index))
    return torch.zeros_like(X).scatter_(dim, index, part.to(X.dtype))
