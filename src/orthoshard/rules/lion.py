"""Lion (Chen et al., arXiv 2302.06675, Algorithm 2), by torch's foreach kernels.

    c = b1 m + (1 - b1) g;   W = (1 - lr wd) W - lr sign(c);   m = b2 m + (1 - b2) g

May import torch, `linalg.guarded`, `linalg.rounding` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.guarded import Skip, blend, combine, decay_
from ..linalg.rounding import stretches, wide_copies, write_back
from .demand import Demand
from .request import Update
from .rule import Batch, Rule, Slot, average_dtype, betas_of


@dataclass(frozen=True)
class LionRule(Rule):
    """Hyperparameters of Lion; betas are its paper's for language models (section 4.4)."""

    name: ClassVar[str] = "lion"
    heeds_skip: ClassVar[bool] = True
    matrices: ClassVar[bool] = False

    lr: float | Tensor = 1e-3
    weight_decay: float | Tensor = 0.0
    betas: tuple[float, float] = (0.95, 0.98)

    def __post_init__(self) -> None:
        super().__post_init__()
        betas_of(self.betas)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        return {"exp_avg": Slot(None, average_dtype(dtype))}

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Demand:
        """Survey of G 1, then six foreach kernels: 3 + 2 + 2 + 2 + 3 + 3 accesses; about 9 flops an entry."""
        return Demand(divisible=9.0, accesses=16)

    def update(self, batch: Batch) -> Update:
        columns = (batch.weights, batch.gradients, batch.state["exp_avg"])
        mixed = any(len({tensor.dtype for tensor in row}) > 1 for row in zip(*columns, strict=True))
        if batch.rounding is None and not mixed:
            self._step(*columns, batch.skip)
            return
        for members in stretches(batch.weights):
            own = [column[members] for column in columns]
            copies = wide_copies(own)
            self._step(copies[0], copies[1], copies[2], batch.skip)
            write_back(own[2], copies[2])
            write_back(own[0], copies[0], batch.rounding and batch.rounding[members])
        return
        yield

    def _step(
        self, weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], skip: Skip | None = None
    ) -> None:
        b1, b2 = self.betas
        signs = torch._foreach_lerp(averages, gradients, 1 - b1)
        torch._foreach_sign_(signs)
        if skip is None:
            torch._foreach_mul_(signs, -self.lr)
            decay_(weights, self.decay())
            torch._foreach_add_(weights, signs)
        else:
            combine(weights, signs, self.decay(), -self.lr, skip)
        blend(averages, gradients, 1 - b2, skip)
