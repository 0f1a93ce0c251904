"""How often a step makes the host wait for the device: once if the host decides whether to skip it, else never.

torch.cuda.set_sync_debug_mode warns of each wait. An eager step of low rank may also wait while it orthonormalizes; see
`LOOKS`. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from orthoshard.lab.bench.selftest.cases import RULES, Options, kernel_choices, settled
from orthoshard.lab.bench.selftest.rows import Check

SHAPES = ((256, 384), (256, 384), (256, 128))
SAID = "called a synchronizing"  # in torch's warning of each wait; its first warning says only that this is a prototype
ALSO: dict[str, Options] = {
    "dion, products float32": {"rule": "dion", "matmul_precision": "float32"},
    "dion, stochastic rounding": {"rule": "dion", "rounding": "stochastic"},
    "dion, interleaved view": {"rule": "dion", "view": "rows:4*(32,32)"},
    "dion, hyperball": {"rule": "dion", "decay": "hyperball"},
    "dion_tail, cautious": {"rule": "dion_tail", "decay": "cautious"},
    "adamw, foreach": {"rule": "adamw", "fused": False},
}


LOOKS = 6  # at most: 3 in each orthonormalization, see `linalg.dependent.adaptive_factor`, and DionTail has two


def syncs(device: torch.device) -> Iterator[Check]:
    for kernel in kernel_choices(device):
        for name, options in {**RULES, **ALSO}.items():
            if kernel != "auto" and name not in ("dion", "dion_tail", "muon"):
                continue
            for capturable in (False, True):
                if capturable and options.get("fused") is False:
                    continue  # refused: only fused kernels can skip a step by themselves
                way = "capturable" if capturable else "eager"
                yield Check(f"{name}, {way}, {kernel}", partial(_waits, options, device, capturable, kernel))


def _waits(options: Options, device: torch.device, capturable: bool, kernel: str) -> tuple[float, float, str]:
    optimizer = settled(SHAPES, options, device, capturable=capturable, kernels=kernel)
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in heard if SAID in str(w.message))
    low_rank = "dion" in str(options["rule"]) and options["rule"] != "dion3"
    looks = LOOKS * len(optimizer.plan().buckets) if low_rank else 0
    limit = 0 if capturable else 1 + looks
    return places.total(), limit, str(dict(places)) if places.total() > limit else ""
