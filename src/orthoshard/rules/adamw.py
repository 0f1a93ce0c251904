"""AdamW (Loshchilov & Hutter, arXiv 1711.05101), by torch's own fused and foreach kernels.

May import torch, `linalg.guarded`, `linalg.rounding` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..linalg.guarded import Skip, decay_, kernel_number
from ..linalg.rounding import Rounding, stretches
from .demand import Demand
from .request import Update
from .rule import Batch, Rule, Scalar, Slot, betas_of, non_negative


@dataclass(frozen=True)
class AdamWRule(Rule):
    """Hyperparameters of AdamW.

    lr 3e-3 was the best of a sweep on a small GPT (docs/log.md); betas are the usual ones of language model
    pretraining (GPT-3, arXiv 2005.14165, appendix B). ``fused`` False leaves the fused kernel out, ``foreach`` False
    the multi-tensor one too; tensors that are not contiguous never go to the fused kernel.
    """

    name: ClassVar[str] = "adamw"
    heeds_skip: ClassVar[bool] = True
    matrices: ClassVar[bool] = False

    lr: float | Tensor = 3e-3
    weight_decay: float | Tensor = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fused: bool | None = None
    foreach: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        betas_of(self.betas)
        non_negative("eps", self.eps)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        return {
            "step": Slot((), torch.float32),
            "exp_avg": Slot(None, dtype),
            "exp_avg_sq": Slot(None, dtype),
        }

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Demand:
        """Survey of G 1, then 4 reads and 3 writes by one fused kernel; about 12 flops an entry."""
        return Demand(divisible=12.0, accesses=8)

    def update(self, batch: Batch) -> Update:
        # torch's fused kernels walk memory from the first element and ignore strides, so they get only the tensors
        # for which that is the whole truth.
        state = batch.state
        columns = [batch.weights, batch.gradients, state["exp_avg"], state["exp_avg_sq"], state["step"]]
        if batch.rounding is not None:
            self._in_float32(columns, batch.rounding)
            return
        plain: list[tuple[Tensor, ...]] = []
        strided: list[tuple[Tensor, ...]] = []
        for row in zip(*columns, strict=True):
            contiguous = self.fused is not False and all(tensor.is_contiguous() for tensor in row)
            (plain if contiguous else strided).append(row)
        for chosen, fused in ((plain, True), (strided, False)):
            if chosen:
                columns = [list(column) for column in zip(*chosen, strict=True)]
                if batch.skip is None:
                    self._kernel(columns, fused, self.lr)
                else:
                    self._unattended(columns, batch.skip)
        return
        yield

    def _in_float32(self, columns: list[list[Tensor]], rounding: Sequence[Rounding]) -> None:
        """On float32 copies: of the kernel's own rounding nothing can be asked. State is rounded to nearest."""
        for members in stretches(columns[0]):
            *narrow, steps = (column[members] for column in columns)
            wide = [[x.to(torch.float32, memory_format=torch.contiguous_format) for x in column] for column in narrow]
            self._kernel([*wide, steps], self.fused is not False, self.lr)
            for column, copies in zip(narrow[2:], wide[2:], strict=True):
                torch._foreach_copy_(column, copies)
            for into, weight, copy in zip(rounding[members], narrow[0], wide[0], strict=True):
                into(weight, copy)

    def _unattended(self, columns: list[list[Tensor]], skip: Skip) -> None:
        """Only the fused kernel skips by itself: it gets copies of what is not contiguous."""
        copies = [[tensor.contiguous() for tensor in column] for column in columns]
        self._kernel(copies, True, kernel_number(self.lr, columns[0][0]), skip.number)
        for column, copied in zip(columns, copies, strict=True):
            for tensor, copy in zip(column, copied, strict=True):
                if tensor is not copy and column is not columns[1]:  # a gradient is never modified
                    tensor.copy_(copy)

    def _kernel(self, columns: list[list[Tensor]], fused: bool, lr: Scalar, skip: Tensor | None = None) -> None:
        weights, gradients, exp_avgs, exp_avg_sqs, steps = columns
        on_device = isinstance(self.lr, Tensor)  # `group_rule` makes numbers of those on the CPU
        options: dict[str, Any] = (
            {"fused": True, "found_inf": skip, "capturable": skip is not None}
            if fused
            else {"foreach": self.foreach is not False, "capturable": on_device}
        )
        weight_decay = self.weight_decay
        if isinstance(weight_decay, Tensor):  # the kernels take a number, and nobody shall wait for this one
            decay_(weights, self.decay())
            weight_decay = 0.0
        adamw(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            **options,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
