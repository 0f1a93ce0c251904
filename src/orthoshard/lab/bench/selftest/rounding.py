"""Stochastic rounding: small steps are taken on average, and the bits are the same as on a CPU.

    kept = <W - W_0, W' - W_0> / |W' - W_0|²       W' the weights in float64: 1 on average, 0 if small steps are lost

The learning rate is so low that a step is a tenth of an ulp or less; rounding to nearest would lose most of it. May
import torch and ``orthoshard``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from orthoshard import rules
from orthoshard.lab.bench.selftest.cases import RULES, TAKEN, Options, exact, start, trained
from orthoshard.lab.bench.selftest.rows import Check

BF16 = torch.bfloat16
# Elementwise rules (False) move every entry by the learning rate. Entries are about 0.05, with an ulp of 2^-12.
SMALL: dict[bool, Options] = {True: {"lr": 2.0**-10, "weight_decay": 0.0}, False: {"lr": 2.0**-16, "weight_decay": 0.0}}
# With these options all numbers are those of a CPU, except for float32's rounding, and so are the bits that round them.
EXACTLY: dict[str, Options] = {
    "dion": {"matmul_precision": "float32"},
    "dion_tail": {"matmul_precision": "float32"},
    "muon": {"polar_dtype": "float32"},
    "adamw": {},
    "lion": {},
}


def rounding(device: torch.device) -> Iterator[Check]:
    for name, options in EXACTLY.items():
        chosen = {**RULES[name], **options, "rounding": "stochastic"}
        yield Check(
            f"{name}: share of small steps lost",
            partial(_lost, {**chosen, **SMALL[rules.RULES[name].matrices]}, device),
        )
        if device.type != "cpu":
            yield Check(f"{name}: share of entries unlike a CPU's", partial(_unlike, chosen, device))


def _lost(options: Options, device: torch.device) -> tuple[float, float]:
    """Return |1 - kept|, and five standard deviations of it as its limit.

    The rounding error of an entry w in a step has variance f (1 - f) ulp², at most |step| ulp, where f is the share of
    an ulp by which the step moves it. An ulp is at most 2^-7 |w|.
    """
    first, true = start(BF16), exact(options, BF16)
    found = trained(options, BF16, device)[1]
    steps = [y - x for x, y in zip(first, true, strict=True)]
    whole = sum(float(step.square().sum()) for step in steps)
    kept = sum(float(((w - x) * step).sum()) for w, x, step in zip(found, first, steps, strict=True)) / whole
    ulps = [2.0**-7 * torch.maximum(x.abs(), y.abs()) for x, y in zip(first, true, strict=True)]
    variance = sum(
        float((torch.minimum(TAKEN * step.abs() * ulp, TAKEN * ulp.square() / 4) * step.square()).sum())
        for step, ulp in zip(steps, ulps, strict=True)
    )
    return abs(1 - kept), 5 * math.sqrt(variance) / whole


def _unlike(options: Options, device: torch.device) -> tuple[float, float]:
    """Return the share of entries that differ from a CPU's, and its limit.

    An entry is rounded another way if a random number falls between two float32 results: one entry in thousands, or one
    in eighty with CUDA's fused AdamW, which corrects biases in float32. With other random numbers it would be half.
    """
    here, there = (trained(options, BF16, torch.device(where))[1] for where in (str(device), "cpu"))
    entries = sum(x.numel() for x in here)
    return sum(int((x != y).sum()) for x, y in zip(here, there, strict=True)) / entries, 0.05
