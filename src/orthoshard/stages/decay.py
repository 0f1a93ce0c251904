"""How far weights move and how they decay: W = decay W - size U.

    decoupled     decay = 1 - lr wd                                         Loshchilov & Hutter, arXiv 1711.05101
    cautious      W_ij -= lr wd W_ij if U_ij W_ij >= 0                      arXiv 2510.12402
    hyperball     W <- (|W_0| / |W|) W - lr |W_0| U / |U|                   MuonH, arXiv 2606.16899; no other decay
    update_floor  if |s U| < tau |W|:  s U <- s U tau |W| / |s U|                  u/w floor, modded-nanogpt track 3

size = lr s, s for the shape; all norms are Frobenius, of one matrix. Hyperball brings |W| back to |W_0| by one factor
per matrix, one step late: the norm is summed after the write and corrected by the next step. So between steps |W| is
off |W_0| by one step's O(lr). May import torch, `directions`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import non_negative, one_of
from ..directions.proposal import Proposal
from ..directions.request import Asks, Sum
from ..slots import Slot
from .stage import Batch, Move, Stage, keep_

KINDS = ("decoupled", "cautious", "hyperball")


@dataclass(frozen=True)
class Decay(Stage):
    """``decay``: the kind of decay."""

    order: ClassVar[int] = 50

    decay: str = "decoupled"

    def __post_init__(self) -> None:
        one_of("decay", self.decay, KINDS)

    @property
    def on(self) -> bool:
        return self.decay != "decoupled"

    @property
    def unread(self) -> dict[str, str]:
        if self.decay != "hyperball":
            return {}
        return {
            "weight_decay": "decay='hyperball' keeps |W| at |W_0|, so nothing decays: leave weight_decay out, or "
            "choose decay='decoupled'"
        }

    @property
    def not_from_zero(self) -> str:
        if self.decay != "hyperball":
            return ""
        return (
            "decay='hyperball' keeps |W| at |W_0| = 0, so it would never move: start it elsewhere, as in "
            "torch.nn.init.normal_(weight, std=0.02), or give its group decay='decoupled'"
        )

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        if self.decay != "hyperball":
            return {}
        wide = torch.promote_types(kept, torch.float32)
        return {"radius": Slot((), wide), "weight_square": Slot((), wide)}

    def move(self, move: Move, proposal: Proposal, batch: Batch) -> Asks:
        if self.decay == "cautious":
            return replace(move, cautious=True)
        radius, square = (batch.state[name].view(-1, 1, 1) for name in ("radius", "weight_square"))
        # A matrix without a radius has not moved yet: its own norm is |W_0|.
        known = radius > 0
        now = torch.where(known, square, (yield from weight_squares(batch)).to(square.dtype))
        start = torch.where(known, radius, now.sqrt())
        keep_(radius, start, batch.skip)
        of_update = yield from proposal.square()
        size = torch.where(of_update > 0, start * of_update.rsqrt(), 0) * move.rate
        decay = torch.where(now > 0, start * now.rsqrt(), 1)
        if batch.skip is not None:
            decay = torch.where(batch.skip.flag, 1, decay)
        return replace(move, size=size, decay=decay)

    def written(self, batch: Batch) -> Asks:
        if self.decay == "hyperball":
            square = batch.state["weight_square"].view(-1, 1, 1)
            keep_(square, (yield from weight_squares(batch)).to(square.dtype), batch.skip)


@dataclass(frozen=True)
class UpdateFloor(Stage):
    """``update_floor`` is tau: the least size of an update, before the learning rate and
    relative to the norm of W; 0 leaves it off."""

    order: ClassVar[int] = 40

    update_floor: float = 0.0

    def __post_init__(self) -> None:
        non_negative("update_floor", self.update_floor)

    @property
    def on(self) -> bool:
        return self.update_floor > 0

    def move(self, move: Move, proposal: Proposal, batch: Batch) -> Asks:
        of_weight = (yield from weight_squares(batch)).sqrt()
        of_update = (yield from proposal.square()).sqrt()
        least = self.update_floor * move.rate * of_weight
        size = torch.as_tensor(move.size, dtype=least.dtype, device=least.device)
        taken = of_update * size
        short = (taken < least) & (taken > 0)
        return replace(move, size=size * torch.where(short, least / taken, 1))


def weight_squares(batch: Batch) -> Asks:
    """Return |W|² of each matrix of ``batch.own``, (b, 1, 1), finished."""
    wide = [torch.promote_types(weight.dtype, torch.float32) for weight in batch.own]
    parts: list[Tensor] = [
        torch.linalg.vector_norm(weight, dim=(-2, -1), keepdim=True, dtype=dtype).square()
        for weight, dtype in zip(batch.own, wide, strict=True)
    ]
    return (yield Sum(torch.cat(parts) if parts else _none(batch), over="both"))


def _none(batch: Batch) -> Tensor:
    momentum = batch.state["momentum"]
    return torch.zeros(0, 1, 1, dtype=torch.promote_types(momentum.dtype, torch.float32), device=momentum.device)
