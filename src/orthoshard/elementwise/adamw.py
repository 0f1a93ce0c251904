"""AdamW (Loshchilov & Hutter, arXiv 1711.05101), by torch's own fused and foreach kernels.

May import torch, `linalg.found_inf`, `linalg.rounding`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..checks import betas_of, non_negative
from ..linalg.found_inf import WIDE, FoundInf, decay_, kernel_number
from ..linalg.rounding import Rounding, stretches, wide_copies, write_back
from ..slots import Slot, average_dtype
from .elementwise import ElementwiseRule, Entries


@dataclass(frozen=True)
class AdamWRule(ElementwiseRule):
    """Hyperparameters of AdamW.

    lr 3e-3 was the best of a sweep on a small GPT (docs/log.md); betas are the usual ones of language model
    pretraining (GPT-3, arXiv 2005.14165, appendix B). ``fused=False`` turns the fused kernel off, ``foreach=False``
    the multi-tensor one too; tensors that are not contiguous never use the fused kernel.
    """

    name: ClassVar[str] = "adamw"

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
            "exp_avg": Slot(None, average_dtype(dtype)),
            "exp_avg_sq": Slot(None, average_dtype(dtype)),
        }

    def step(self, entries: Entries) -> None:
        state = entries.state
        columns = [entries.weights, entries.gradients, state["exp_avg"], state["exp_avg_sq"], state["step"]]
        ways: dict[str, list[int]] = {}
        for number, row in enumerate(zip(*columns, strict=True)):
            ways.setdefault("copies" if entries.rounding else self._way(row, entries.skip), []).append(number)
        for way, members in ways.items():
            chosen = [[column[i] for i in members] for column in columns]
            if way == "fused":
                self._kernel(chosen, True, entries.skip)
            else:
                self._in_stretches(chosen, way == "copies", entries.rounding, entries.skip)

    def _way(self, row: Sequence[Tensor], skip: FoundInf | None) -> str:
        """Return how a parameter is updated: "fused", "foreach", or through "copies" of it for a kernel.

        torch's fused kernels walk memory from the first element and ignore strides. Both kinds need one dtype. Below
        float32 the foreach kernel rounds 1 - lr wd to the weights' dtype, and eps to 0 in float16.
        """
        weight, gradient, average = row[:3]
        if weight.dtype == gradient.dtype == average.dtype:
            if (skip is not None or self.fused is not False) and all(tensor.is_contiguous() for tensor in row):
                return "fused"
            if skip is None and weight.dtype in WIDE:  # only the fused kernel skips by itself
                return "foreach"
        return "copies"

    def _in_stretches(
        self, columns: list[list[Tensor]], on_copies: bool, rounding: Sequence[Rounding] | None, skip: FoundInf | None
    ) -> None:
        """Update what needs temporaries: by the foreach kernel, or on copies that are contiguous and at least in
        float32. State is rounded to nearest."""
        *columns, steps = columns
        fused = on_copies and (skip is not None or self.fused is not False)
        for stretch in stretches(columns, rounding):
            own = stretch.columns
            copies = wide_copies(own) if on_copies else own
            # kernels count steps: every piece of a parameter takes the same step, and only its last piece counts it
            ends = zip(stretch.numbers, stretch.last, strict=True)
            counts = [steps[number] if last else steps[number].clone() for number, last in ends]
            self._kernel([*copies, counts], fused, skip)
            write_back(own[0], copies[0], stretch.rounding)
            for column, copied in zip(own[2:], copies[2:], strict=True):
                write_back(column, copied)

    def _kernel(self, columns: list[list[Tensor]], fused: bool, skip: FoundInf | None) -> None:
        weights, gradients, exp_avgs, exp_avg_sqs, steps = columns
        # Step counts are on the weights' device: torch reads each of them, and waits, unless ``capturable`` is set. An
        # lr that is still a tensor is on the device, because `group_rule` makes numbers of those on the CPU.
        on_device = isinstance(self.lr, Tensor) or weights[0].device.type == "cuda"
        lr = self.lr if skip is None else kernel_number(self.lr, weights[0])
        options: dict[str, Any] = (
            {"fused": True, "found_inf": skip and skip.number, "capturable": skip is not None}
            if fused
            else {"foreach": self.foreach is not False, "capturable": on_device}
        )
        weight_decay = self.weight_decay
        if isinstance(weight_decay, Tensor):  # the kernels take a number, and reading this one would wait
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
