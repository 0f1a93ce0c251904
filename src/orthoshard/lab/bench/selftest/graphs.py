"""A captured step, when replayed, takes the same steps as a plain optimizer, and skips the same one.

In float32 and bfloat16. Both run in one dtype on one device and may differ in the order of rounding. Each differs from
float64 by at most `cases.limit`, so the limit is twice that. The learning rate is halved in place after every step. May
import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from orthoshard.graphs import graphed
from orthoshard.lab.bench.selftest.cases import (
    BAD,
    RULES,
    STEPS,
    Options,
    built,
    compared,
    gradients,
    kernel_choices,
    name_of,
    start,
)
from orthoshard.lab.bench.selftest.rows import Check
from orthoshard.optimizer import RuleOptimizer

STAGED: dict[str, Options] = {
    "dion, hyperball": {"rule": "dion", "decay": "hyperball"},
    "dion_tail, cautious": {"rule": "dion_tail", "decay": "cautious"},
    "dion, stochastic rounding": {"rule": "dion", "rounding": "stochastic"},
}


def graphs(device: torch.device) -> Iterator[Check]:
    for kernel in kernel_choices(device):
        for name, options in {**RULES, **STAGED}.items():
            if kernel == "auto" or name in ("dion", "dion_tail", "muon"):
                for dtype in (torch.float32, torch.bfloat16) if kernel == "auto" else (torch.bfloat16,):
                    call = partial(_apart, options, dtype, device, kernel)
                    yield Check(f"{name}, {name_of(dtype)}, {kernel}", call)


def _apart(options: Options, dtype: torch.dtype, device: torch.device, kernel: str) -> tuple[float, float]:
    models = [[nn.Parameter(weight.to(device, dtype)) for weight in start(dtype)] for _ in range(2)]
    for parameter in (*models[0], *models[1]):
        parameter.grad = torch.ones_like(parameter)
    plain, captured = (built(model, options, capturable=bool(c), kernels=kernel) for c, model in enumerate(models))
    with graphed(captured) as replay:
        for step in range(STEPS):
            for model in models:
                fill(model, step, dtype, step == BAD)
            plain.step()
            replay()
            _halve(plain, captured)
        counts = [(o.skipped_steps, o.skipped_in_a_row) for o in (plain, captured)]
    if counts != [(1, 0)] * 2:
        raise AssertionError(f"steps skipped, and in a row: plain {counts[0]}, captured {counts[1]}; not (1, 0)")
    first, second = ([weight.detach().to("cpu", torch.float64) for weight in model] for model in models)
    figure, limit = compared(plain, second, first, dtype, device)
    return figure, 2 * limit


def fill(model: list[nn.Parameter], step: int, dtype: torch.dtype, bad: bool) -> None:
    """Write the gradients of ``step`` in place, where a graph reads them."""
    for weight, gradient in zip(model, gradients(step, dtype, bad=bad), strict=True):
        assert weight.grad is not None
        weight.grad.copy_(gradient.to(dtype))


def _halve(*optimizers: RuleOptimizer) -> None:
    """Halve the learning rates, in place if they are tensors."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
