"""Normalization: bring the rows of U, or all of U, to another length; U's factors are scaled, and U is not formed.

    row_moment    v_i <- b v_i + (1 - b) |U_i|² / n           NorMuon (arXiv 2510.05491), b = 0.95
                  U_i <- U_i / sqrt(max(v_i, 1e-10)),  then all of U back to the |U|_F that it had
    frobenius     U <- sqrt(d) U / |U|_F,  d = min(m, n)      Muon+ (arXiv 2602.21545)

U (b, m, n), v (b, m). Row lengths of U come from thin factors (`Proposal.row_squares`). A row that does not move keeps
its v, so that a neuron without gradient, or one that was not selected, gets no larger step later.
May import torch, `directions`, `slots`, `checks` and this room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import fraction, switch
from ..directions.proposal import Proposal
from ..directions.request import Asks, Sum
from ..slots import Slot
from .stage import Batch, Stage, keep_

# The paper's guard against a division by zero. A mean square is about 1/max(m, n).
LEAST = 1e-10


@dataclass(frozen=True)
class RowMoment(Stage):
    """``row_moment`` is b; 0 leaves it off."""

    order: ClassVar[int] = 20

    row_moment: float = 0.0

    def __post_init__(self) -> None:
        fraction("row_moment", self.row_moment, zero=True, one=False)

    @property
    def on(self) -> bool:
        return self.row_moment > 0

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        return {"row_moment": Slot(("rows",), torch.promote_types(kept, torch.float32))}

    def normalize(self, proposal: Proposal, batch: Batch) -> Asks:
        v = batch.state["row_moment"].unsqueeze(-1)
        squares = yield from proposal.row_squares()
        moves = squares > 0
        new = torch.where(moves, v + (1 - self.row_moment) * (squares / batch.shape[1] - v), v)
        factor = new.clamp(min=LEAST).rsqrt()
        both = torch.cat([squares, squares * factor.square()], -1).sum(1, keepdim=True)
        before, after = (yield Sum(both, over="rows")).split(1, dim=-1)
        proposal.scale_rows(factor * torch.where(after > 0, (before / after).sqrt(), 1))
        keep_(v, new, batch.skip)


@dataclass(frozen=True)
class Frobenius(Stage):
    """``frobenius``: bring all of U to the Frobenius norm sqrt(d)."""

    order: ClassVar[int] = 30

    frobenius: bool = False

    def __post_init__(self) -> None:
        switch("frobenius", self.frobenius)

    @property
    def on(self) -> bool:
        return self.frobenius

    def normalize(self, proposal: Proposal, batch: Batch) -> Asks:
        square = yield from proposal.square()
        d = min(batch.shape)
        proposal.scale_rows(torch.where(square > 0, math.sqrt(d) * square.rsqrt(), 0))
