"""DionTail's direction: Dion with its remainder applied at once, the rows at one length. Our own rule; docs/rules.md.

    P = orthonormal(Nᵀ Q)
    R = N P                                 R Pᵀ is what rank r captures of N
    V = orthonormal(R)                      V Pᵀ, its orthonormal part; V is the next Q
    E = N - R Pᵀ                            the tail
    T = sqrt((d - r) / m) · (rows of E at length 1)          |T|_F² = d - r, as an orthonormal completion would have
    U = V Pᵀ + c T

N, E, T (b, m, n); Q, R, V (b, m, r); P (b, n, r); d = min(m, n); r = ceil(rank_fraction d); c the tail weight.

E is never formed. P has orthonormal columns, so the rows of R Pᵀ and E are orthogonal, and by Pythagoras

    |E_i|² = |N_i|² - |R_i|²;       with D = diag(c sqrt((d - r) / m) / |E_i|),
    V Pᵀ + c T = (V - D R) Pᵀ + D N        six products of m n r in all, where Dion takes eight
    |U_i|² = |V_i|² + D_i² |E_i|²          since E P = 0

Q always spans the rows of W: only then is |R_i| the length of what is captured of row N_i. Dion takes R with unit
columns in place of V; under Nesterov momentum these are so far from orthogonal that the tail's gain is lost
(docs/rules.md).

Closest relatives: Orth-Dion (arXiv 2605.16341) is Dion with the right factor by QR, as V here. Fira (2410.01623) and
FRUGAL (2411.07837) apply the remainder of a low-rank Adam, scaled or by its sign. Nora (2605.03769) is row-normalized
momentum alone, our tail at rank 0. NorMuon (2510.05491) evens out the rows of a whole orthonormal update.
May import torch, `linalg`, `slots`, `checks` and this room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import non_negative
from ..linalg.host_sync import device_type
from ..linalg.products import Precision
from ..linalg.unit import column_squares, row_squares
from ..slots import Slot
from .low_rank import LowRank, orthonormalize, rounding_of
from .proposal import Proposal
from .request import Asks, OnWholeMatrices, Sum
from .seen import Seen

# |N_i|² - |R_i|² is off by about this many roundings of |N_i|²: P is orthonormal to 5e-7 in float32 (4 roundings),
# and the products of a row add a few more. A tail shorter than the square root of that counts as zero.
CANCELLATION = 32.0


@dataclass(frozen=True)
class DionTail(LowRank):
    """Options of DionTail. ``tail_weight`` is c; 0 leaves the captured part alone."""

    linear: ClassVar[bool] = False  # the tail is dense: it needs every entry of the mean gradient

    tail_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("tail_weight", self.tail_weight)

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        return {"Q": Slot(("rows", self.rank(*shape)), kept, fill="normal")}

    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks:
        m, n = shape
        noise = self.noise(seen.N, shape)
        lengths = yield from seen.row_squares()
        whole = yield Sum(lengths.sum(1, keepdim=True), over="rows")
        # Y = Nᵀ Q gets no name, so that it is freed at once: it is as large as P
        P = yield OnWholeMatrices(orthonormalize(noise), seen.mT.times(state["Q"]), over="columns", partial="rows")
        R = yield Sum(seen.times(P), over="columns")
        V = yield OnWholeMatrices(orthonormalize(noise), R, over="rows")
        live = yield Sum(column_squares(V), over="rows")

        tail = lengths - row_squares(R)
        # a tail counts if it is above rounding of its own row, and above rounding of the mean row
        least = torch.maximum(_cancellation(seen.N, self.precision) * lengths, noise**2 / m * whole)
        weight = self.tail_weight * math.sqrt((min(m, n) - self.rank(m, n)) / m)
        D = (weight * tail.clamp(min=least).rsqrt()).masked_fill_(tail <= least, 0)
        L = _less(V, D, R)
        return Proposal(L, P, D, seen, orthonormal="right", basis=V, live=live, beyond=tail)


def _less(V: Tensor, D: Tensor, R: Tensor) -> Tensor:
    """Return V - D R. R may be overwritten."""
    if device_type(R) == "cpu":  # addcmul of a column is ten times as slow there
        return R.to(D.dtype).mul_(D).neg_().add_(V)
    return torch.addcmul(V, D, R, value=-1)


def _cancellation(N: Tensor, precision: Precision | None) -> float:
    """Return the share of |N_i|² below which |N_i|² - |R_i|² is rounding. P and R are rounded to the state's dtype, or
    their operands as ``precision`` says."""
    wide = torch.promote_types(N.dtype, torch.float32)
    narrow = 4 * torch.finfo(N.dtype).eps if N.dtype != wide else 8 * rounding_of(N, precision)
    return CANCELLATION * torch.finfo(wide).eps + narrow
