"""Dion's direction (Ahn, Xu, Abreu, Langford, arXiv 2504.05295, v3 Algorithm 1).

    P = orthonormal(X Q)                X = N, or Nᵀ if Q spans the rows of W
    R = Xᵀ P
    Q = R / (column norms of R)
    U = P Qᵀ                            transposed as X is

N (b, m, n); X (b, p, q) is N or Nᵀ; Q, R (b, q, r); P (b, p, r); r = ceil(rank_fraction min(m, n)). With the paper's
momentum, N = M + G, error feedback takes (1 - momentum) P Rᵀ out of M again: see `stages.momentum`.

X enters P and R linearly. So replicas may keep the momenta of their own gradients and exchange the means of these two
thin products instead of gradients ("compressed gradient sync"; PowerSGD, arXiv 1905.13727). Error feedback then takes
the same P Rᵀ from each momentum, and the mean of the momenta is the momentum of the mean gradient.
May import torch, `linalg`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import one_of
from ..linalg.unit import column_squares, unit_columns
from ..slots import Slot
from .low_rank import LowRank, orthonormalize
from .proposal import Proposal
from .request import Asks, OnWholeMatrices, Sum
from .seen import Seen


@dataclass(frozen=True)
class Dion(LowRank):
    """Options of Dion. ``q_side``: the side of W that Q spans; "columns" is the paper's own form, "shorter" that of the
    authors' code on one device."""

    linear: ClassVar[bool] = True
    withholds: ClassVar[bool] = True

    q_side: Literal["rows", "columns", "shorter"] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("q_side", self.q_side, ("rows", "columns", "shorter"))

    def side(self, shape: tuple[int, ...]) -> Literal["rows", "columns"]:
        """Return the side of an (m, n) matrix that Q spans."""
        m, n = shape
        if self.q_side == "shorter":
            return "rows" if m < n else "columns"
        return self.q_side

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        return {"Q": Slot((self.side(shape), self.rank(*shape)), kept, fill="normal")}

    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks:
        q_side = self.side(shape)
        rows = q_side == "rows"
        X, p_side = (seen.mT, "columns") if rows else (seen, "rows")
        noise = self.noise(seen.N, shape)
        # Y = X Q gets no name, so that it is freed at once: it is as large as P
        P = yield OnWholeMatrices(
            orthonormalize(noise), X.times(state["Q"]), over=p_side, partial=q_side, linear_in_gradient=True
        )
        R = yield Sum(X.mT.times(P), over=p_side, linear_in_gradient=True)
        lengths = (yield Sum(column_squares(R), over=q_side)).sqrt()
        V, lengths = unit_columns(R, lengths, noise)
        left, right = (V, P) if rows else (P, V)
        side = "right" if rows else "left"
        return Proposal(left, right, orthonormal=side, basis=V, live=lengths, captured=lengths)
