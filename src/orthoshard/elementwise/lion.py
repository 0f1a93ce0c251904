"""Lion (Chen et al., arXiv 2302.06675, Algorithm 2), by torch's foreach kernels.

    c = b1 m + (1 - b1) g;   W = (1 - lr wd) W - lr sign(c);   m = b2 m + (1 - b2) g

May import torch, `linalg.found_inf`, `linalg.rounding`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import betas_of
from ..linalg.found_inf import WIDE, FoundInf, axpby_, decay_, lerp_
from ..linalg.rounding import stretches, wide_copies, write_back
from ..slots import Slot, average_dtype
from .elementwise import ElementwiseRule, Entries


@dataclass(frozen=True)
class LionRule(ElementwiseRule):
    """Hyperparameters of Lion; betas are those that the paper uses for language models (section 4.4)."""

    name: ClassVar[str] = "lion"

    lr: float | Tensor = 1e-3
    weight_decay: float | Tensor = 0.0
    betas: tuple[float, float] = (0.95, 0.98)

    def __post_init__(self) -> None:
        super().__post_init__()
        betas_of(self.betas)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        return {"exp_avg": Slot(None, average_dtype(dtype))}

    def step(self, entries: Entries) -> None:
        columns = (entries.weights, entries.gradients, entries.state["exp_avg"])
        mixed = any(len({tensor.dtype for tensor in row}) > 1 for row in zip(*columns, strict=True))
        for stretch in stretches(columns, entries.rounding):
            own = stretch.columns
            copies = own if entries.rounding is None and not mixed else wide_copies(own)
            self._step(copies[0], copies[1], copies[2], entries.skip)
            write_back(own[2], copies[2])
            write_back(own[0], copies[0], stretch.rounding)

    def _step(
        self, weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], skip: FoundInf | None = None
    ) -> None:
        b1, b2 = self.betas
        signs = torch._foreach_lerp(averages, gradients, 1 - b1)
        torch._foreach_sign_(signs)
        decay = self.decay()
        if skip is None and weights[0].dtype not in WIDE and not isinstance(decay, Tensor) and decay != 1:
            # Decayed alone, a narrow weight would round to what it was. So: W + d (T - W), T = -(lr / d) sign.
            torch._foreach_mul_(signs, -self.lr / (1 - decay))
            torch._foreach_lerp_(weights, signs, 1 - decay)
        elif skip is None:
            torch._foreach_mul_(signs, -self.lr)
            decay_(weights, decay)
            torch._foreach_add_(weights, signs)
        else:
            axpby_(weights, signs, decay, -self.lr, skip)
        lerp_(averages, gradients, 1 - b2, skip)
