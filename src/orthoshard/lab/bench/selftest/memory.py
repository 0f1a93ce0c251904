"""The peak memory of a step after the first ones, compared with the dry run.

May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from orthoshard.lab.bench.memory import peak_bytes
from orthoshard.lab.bench.selftest.cases import RULES, Options, settled
from orthoshard.lab.bench.selftest.rows import Check
from orthoshard.lab.plan.count import counted
from orthoshard.optimizer import RuleOptimizer

# One layer of a model of width 1024: so large that the peak is made of matrices, not bookkeeping.
LAYER = ((1024, 1024), (256, 1024), (256, 1024), (1024, 1024), (4096, 1024), (4096, 1024), (1024, 4096))
# Not counted by a dry run: tensors are rounded up to 512 bytes, and cuBLAS and cuSOLVER allocate memory in a call.
BESIDE = 2**23
SHARE = 1.1


def memory(device: torch.device) -> Iterator[Check]:
    for name, extra in (
        ("dion", {}),
        ("dion", {"rank_fraction": 1 / 16}),
        ("dion_tail", {}),
        ("muon", {}),
        ("normuon", {}),
        ("dion", {"rounding": "stochastic"}),
        ("dion_tail", {"decay": "cautious"}),
    ):
        said = "".join(f", {key} {value}" for key, value in extra.items())
        yield Check(f"{name}{said}: MB", partial(_peak, {**RULES[name], **extra}, device))


def _peak(options: Options, device: torch.device) -> tuple[float, float]:
    """Return the peak and its limit, in MB."""
    optimizer = settled(LAYER, options, device)
    return peak_bytes(optimizer.step, device) / 1e6, (SHARE * predicted(optimizer) + BESIDE) / 1e6


def predicted(optimizer: RuleOptimizer) -> float:
    """Return the bytes of temporaries that `orthoshard plan` predicts for a step."""
    return counted(optimizer.plan(), optimizer.param_groups, 1).here.temporaries
