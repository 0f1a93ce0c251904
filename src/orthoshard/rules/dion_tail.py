"""DionTail: Dion whose remainder is applied at once, its rows at one length, in place of error feedback. Our own rule.

    B = mu B + G
    N = G + mu B   (Nesterov)   or   B
    P = orthonormal(Nᵀ Q)
    R = N P                                 R Pᵀ is what rank r captures of N
    V = orthonormal(R)                      V Pᵀ, its orthonormal part; V is the next Q
    E = N - R Pᵀ                            the tail
    T = sqrt((d - r) / m) · (rows of E at length 1)          |T|_F² = d - r, as an orthonormal completion would have
    W = (1 - lr wd) W - lr s (V Pᵀ + c T)

W, B, N, E, T (b, m, n); Q, R, V (b, m, r); P (b, n, r); d = min(m, n); r = ceil(rank_fraction d); c the tail weight;
s by one of three conventions, see `rule.SCALES`.

E is never formed. P has orthonormal columns, so the rows of R Pᵀ and E are orthogonal, and by Pythagoras

    |E_i|² = |N_i|² - |R_i|²;       with D = diag(c sqrt((d - r) / m) / |E_i|),
    V Pᵀ + c T = (V - D R) Pᵀ + D N        six products of m n r in all, where Dion takes eight

With Nesterov momentum N is held over 1 + mu, which changes no update and saves a sweep (`accumulate.look_ahead`).
Q spans the rows of W, always: only then does |R_i| speak of the rows of N. Dion gives R unit columns instead; with
Nesterov momentum these are far enough from orthogonal to cost what the tail gains (docs/dion_tail.md).

The closest relatives: Orth-Dion (arXiv 2605.16341) is Dion with the right factor by QR, as V here; Fira (2410.01623)
and FRUGAL (2411.07837) apply the remainder of a low-rank Adam, scaled or by its sign; Nora (2605.03769) is
row-normalized momentum alone, our tail at rank 0; NorMuon (2510.05491) evens out the rows of a whole orthonormal
update. May import torch, `linalg` and this room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.accumulate import accumulate, add_product_and_rows, blocks, look_ahead, look_back
from ..linalg.products import Precision, thin
from ..linalg.scale import scale_where_needed
from ..linalg.unit import column_squares, keep_live, row_squares
from .demand import Dealt, Demand, Shared, Summed
from .figures import tail_figures
from .low_rank import LowRankRule, noise_of, rounding_of
from .request import Each, Note, Part, Share, Sum, Update
from .rule import SCALES, Batch, Slot, non_negative, state_dtype

# |N_i|² - |R_i|² is known to about this many roundings of |N_i|²: P is orthonormal to 5e-7 in float32 (4 roundings),
# and the products of a row round by a few more. A tail shorter than the square root of that is taken for zero.
CANCELLATION = 32.0


@dataclass(frozen=True)
class DionTailRule(LowRankRule):
    """Hyperparameters of DionTail. ``tail_weight`` is c; 0 leaves a Dion without error feedback."""

    name: ClassVar[str] = "dion_tail"
    heeds_skip: ClassVar[bool] = True
    matrices: ClassVar[bool] = True

    nesterov: bool = True
    tail_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("tail_weight", self.tail_weight)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        kept = state_dtype(self.state_dtype, dtype)
        return {
            "momentum": Slot(("rows", "columns"), kept),
            "Q": Slot(("rows", self.rank(*shape)), kept, fill="normal"),
        }

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Demand:
        """Three products of 2 m n r flops, two of them by each replica for its share; orthonormalizations of P and R,
        in two passes of 4 (m + n) r² + 4/3 r³. Accesses: survey of G 1, B and N 3, Nᵀ Q and N P 2, W 2 and N 1,
        B again 2.
        """
        m, n = shape
        r, kept = self.rank(m, n), state_dtype(self.state_dtype, dtype)
        wide = torch.promote_types(kept, torch.float32)
        return Demand(
            divisible=2.0 * m * n * r,
            shared=4.0 * m * n * r + 2 * (4.0 * (m + n) * r**2 + 4 / 3 * r**3),
            accesses=11,
            asks=(
                Summed((1, 1), torch.float64, over="both"),
                Summed(("rows", 1), wide, over="columns"),
                Summed((1, 1), wide, over="rows"),
                Shared(
                    inside=(
                        Dealt(("columns", r), kept, over="columns", partial="rows"),
                        Summed(("rows", r), kept, over="columns"),
                        Dealt(("rows", r), kept, over="rows"),
                        Summed((r,), wide, over="rows"),
                    ),
                    results=((("columns", r), kept), (("rows", r), kept), (("rows", r), kept), ((r,), wide)),
                ),
            ),
        )

    def update(self, batch: Batch) -> Update:
        B, Q = batch.state["momentum"], batch.state["Q"]
        m, n = batch.shape
        noise = noise_of(B.dtype, batch.shape, self.matmul_precision)

        ahead = self.nesterov and self.momentum > 0
        if ahead:
            direction, size_of_N, squares = look_ahead(B, batch.gradients, self.momentum, batch.skip)
        else:
            direction, size_of_N = B, accumulate(B, batch.gradients, self.momentum, batch.skip)
            squares = row_squares(direction)
        a = scale_where_needed((yield Sum(size_of_N.double(), over="both")), B.dtype)
        N = direction if a is None else direction / a  # the update does not depend on the size of N
        lengths = yield Sum(squares if a is None else row_squares(N), over="columns")
        whole = yield Sum(lengths.sum(1, keepdim=True), over="rows")
        P, R, V, unit = yield Share(partial(self._factors, noise), (N, Q))
        keep_live(V, unit, Q, batch.skip)

        tail = lengths - row_squares(R)
        # known to rounding of its own row, and no shorter than rounding of the mean row
        least = torch.maximum(_cancellation(B.dtype, self.matmul_precision) * lengths, noise**2 / m * whole)
        weight = self.tail_weight * math.sqrt((min(m, n) - self.rank(m, n)) / m)
        D = torch.where(tail > least, weight * tail.clamp(min=least).rsqrt(), 0)
        size = self.lr * SCALES[self.scale](m, n)
        yield Note(N, tail_figures, (P, V, R, D, tail, size))
        L = V.to(D.dtype).sub_(R.to(D.dtype).mul_(D))  # both are done with; addcmul of a column is ten times as slow
        alpha, decay = -size, self.decay()
        # a scale that the host does not know: once here, rather than by every block
        lefts, tails, alpha = (L * alpha, D * alpha, 1.0) if isinstance(alpha, Tensor) else (L, D, alpha)
        in_blocks = [blocks(each, batch.weights) for each in (lefts, P, tails, N, direction)]
        rounding = batch.rounding or [None] * len(batch.weights)
        for weight, gradient, narrow, left, right, rows, x, ahead_of in zip(
            batch.weights, batch.gradients, rounding, *in_blocks, strict=True
        ):
            add_product_and_rows(weight, left, right, rows, x, alpha, decay, self.matmul_precision, narrow)
            if ahead and direction is B:  # while it is in the cache
                look_back(ahead_of, gradient, self.momentum, batch.skip)

    def _factors(self, noise: float, N: Tensor, Q: Tensor) -> Part:
        """P, R, V and the squared column norms of V, 1 or 0: one amortized power iteration."""
        orthonormal = self.orthonormalize(noise)
        P = yield Each(orthonormal, thin(N.mT, Q, self.matmul_precision), over="columns", partial="rows")
        R = yield Sum(thin(N, P, self.matmul_precision), over="columns")
        V = yield Each(orthonormal, R, over="rows")
        squares = yield Sum(column_squares(V), over="rows")
        return P, R, V, squares


def _cancellation(dtype: torch.dtype, precision: Precision | None) -> float:
    """The share of |N_i|² below which |N_i|² - |R_i|² is rounding. P and R are rounded to the state's dtype, or their
    operands to what ``precision`` says."""
    wide = torch.promote_types(dtype, torch.float32)
    narrow = 4 * torch.finfo(dtype).eps if dtype != wide else 8 * rounding_of(dtype, precision)
    return CANCELLATION * torch.finfo(wide).eps + narrow
