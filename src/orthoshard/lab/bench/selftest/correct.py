"""Every rule, dtype, stage, precision and kernel choice on this device, compared with float64 on the CPU: see `cases`.

May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch

from orthoshard.lab.bench.selftest.cases import (
    DTYPES,
    RULES,
    STAGES,
    Options,
    error,
    kernel_choices,
    name_of,
    trained,
)
from orthoshard.lab.bench.selftest.rows import Check, absent

# With kernels other than the default. Their passes depend on dtypes, but not on every option: these use each pass.
OTHER_KERNELS = ("dion", "dion, q_side columns", "dion, Nesterov", "dion_tail", "muon", "row_norm")
STAGED = ("dion", "dion_tail", "muon")


def correct(device: torch.device) -> Iterator[Check]:
    for kernel in kernel_choices(device):
        for name, options in RULES.items():
            if kernel == "auto" or name in OTHER_KERNELS:
                for dtype in DTYPES:
                    yield _check(name, options, dtype, device, kernel)
        for rule in STAGED:
            for stage, options in STAGES.items():
                if kernel == "auto" or stage == "nanochat's":
                    yield _check(f"{rule}, {stage}", {"rule": rule, **options}, torch.float32, device, kernel)
        for name, options in _precisions().items() if kernel != "torch" else ():
            yield _check(name, options, torch.float32, device, kernel)
    for size in (1e-30, 1e30):
        for name in ("dion", "dion_tail", "muon"):
            # The size should not matter: the limit is that of size 1; the float64 run has gradients of the same size.
            run = partial(error, RULES[name], torch.float32, device, size=size)
            yield Check(f"{name}, gradients of size {size:g}", run)
    for name in ("dion", "dion_tail", "muon", "adamw"):
        yield Check(f"{name} twice: entries that differ", partial(_twice, RULES[name], device))


def _precisions() -> dict[str, Options]:
    found: dict[str, Options] = {}
    for rule in ("dion", "dion_tail"):
        for precision in ("float32", "tf32", "bfloat16"):
            found[f"{rule}, products {precision}"] = {"rule": rule, "matmul_precision": precision}
    for rule in STAGED:
        found[f"{rule}, state bfloat16"] = {"rule": rule, "state_dtype": "bfloat16"}
    return found


def _check(name: str, options: Options, dtype: torch.dtype, device: torch.device, kernel: str) -> Check:
    what = f"{name}, {name_of(dtype)}, {kernel}"
    if kernel == "triton" and find_spec(kernel) is None:
        return absent(what, f"{kernel} is not installed")
    return Check(what, partial(error, options, dtype, device, kernel=kernel))


def _twice(options: Options, device: torch.device) -> tuple[float, float]:
    """Return in how many entries two equal runs differ, and the limit 0: sums always have the same order."""
    first, second = (trained(options, torch.float32, device)[1] for _ in range(2))
    return float(sum(int((x != y).sum()) for x, y in zip(first, second, strict=True))), 0.0
