"""One bench from plan to result: builds the contestants, times first steps and rounds, then measures peak memory.

May import torch and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orthoshard.lab.bench import environment
from orthoshard.lab.bench.contestants import Contestant, Workload
from orthoshard.lab.bench.memory import peak_bytes, state_bytes
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.report import Measured, to_json
from orthoshard.lab.bench.timing import clock, run_rounds

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to time, and how.

    Args:
        rounds: None means as many as fit into ``seconds``.
        limit: seconds that the first steps of a contestant may take; 0: no limit.
    """

    shapes: ModelShapes
    contestants: Sequence[Contestant]
    device: torch.device
    dtype: torch.dtype
    spectrum: str = "flat"
    rounds: int | None = None
    seconds: float = 120.0
    first_steps: int = 3
    peak: bool = True
    seed: int = 0
    limit: float = 0.0


def measure(plan: Plan, progress: Progress = lambda what, share: None) -> dict[str, Any]:
    """Run ``plan`` and return the contents of the file. Raises ValueError if every contestant exceeds the limit.

    ``progress`` is called with the current phase and the finished share of it.
    """
    milliseconds = clock(plan.device)
    load_before = environment.load()
    progress("random gradients", 0.0)
    work = Workload(plan.shapes, plan.device, plan.dtype, plan.spectrum, plan.seed)
    warm_up(plan.device, plan.dtype)

    steps: dict[str, Callable[[], object]] = {}
    first: dict[str, tuple[float, ...]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    flops: dict[str, int] = {}
    left_out: dict[str, float] = {}
    for k, contestant in enumerate(plan.contestants):
        progress(f"first steps: {contestant.name}", k / len(plan.contestants))
        name, begun = contestant.name, time.monotonic()
        if contestant.optimizer is not None:
            weights = work.parameters()
            times: list[float] = []
            for _ in range(plan.first_steps):
                optimizers.pop(name, None)  # frees its state before the next one allocates
                optimizers[name] = contestant.optimizer(weights)
                times.append(milliseconds(optimizers[name].step))
                if _late(plan, begun):
                    break
            if name not in optimizers:
                optimizers[name] = contestant.optimizer(weights)
            steps[name] = optimizers[name].step
            first[name] = tuple(times)
        else:
            assert contestant.products is not None, name
            floor = contestant.products(work)
            steps[name] = floor.step
            flops[name] = floor.flops()
        if not _late(plan, begun):
            steps[name]()  # so that the rounds never time a first step
        if _late(plan, begun):
            left_out[name] = time.monotonic() - begun
            del steps[name]
            optimizers.pop(name, None)
    if not steps:
        raise ValueError(f"Every contestant took longer than --limit {plan.limit:g} s: give more, or fewer --layers.")

    spreads = run_rounds(
        steps,
        milliseconds,
        plan.rounds,
        plan.seconds,
        plan.seed,
        progress=lambda done, share: progress(f"round {done}", share),
    )
    measured: list[Measured] = []
    there = [contestant for contestant in plan.contestants if contestant.name in steps]
    for k, contestant in enumerate(there):
        name = contestant.name
        progress(f"peak memory: {name}", k / len(there))
        measured.append(
            Measured(
                name,
                spreads[name],
                first.get(name, ()),
                contestant.floor,
                flops.get(name),
                state_bytes(optimizers[name]) if name in optimizers else None,
                peak_bytes(steps[name], plan.device) if plan.peak and name in optimizers else None,
                contestant.rival,
                plan.shapes.elements * plan.dtype.itemsize,
            )
        )
    return to_json(measured, {**about(plan, load_before), "left_out": left_out})


def _late(plan: Plan, begun: float) -> bool:
    return bool(plan.limit) and time.monotonic() - begun > plan.limit


def about(plan: Plan, load_before: float | None) -> dict[str, Any]:
    """Return the head of a file: what was measured, and where. Call it at the end, for the load afterwards."""
    return {
        "model": {
            "name": plan.shapes.name,
            "matrix_elements": plan.shapes.elements,
            "batches": [{"matrices": b, "d_out": m, "d_in": n} for (m, n), b in plan.shapes.batches().items()],
        },
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "spectrum": plan.spectrum,
        "matmul_precision": torch.get_float32_matmul_precision(),
        **environment.describe(plan.device),
        "load_before": load_before,
        "load_after": environment.load(),
    }


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Pay the one-time costs of a process (torch's own imports, threads, BLAS handles), so that no contestant does."""
    weight = nn.Parameter(torch.ones(64, 64, device=device, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    torch.bmm(weight.detach()[None], weight.detach()[None])
    if device.type == "cuda":
        torch.cuda.synchronize()
