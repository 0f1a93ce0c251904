"""Predicted and measured steps of one process and of several on this machine, whose rates are measured as well.

    predicted = products + passes + wire      `estimate`, from the plan of the same matrices and the measured machine
    measured  = median of steps in a row      `bench.sharded`: rows cut over gloo processes of one thread each

Rates are measured before and after the steps, on the same cores, and the prediction is the mean of the two, because a
shared machine changes its speed within minutes. ``others`` is the share of the processors' time that other processes
used meanwhile, if the system reports it; such load never affects both figures equally. May import torch and
``orthoshard``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from orthoshard import RuleOptimizer
from orthoshard.groups import complete
from orthoshard.lab.bench import sharded
from orthoshard.lab.bench.busy import others_since
from orthoshard.lab.bench.contestants import Workload
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.timing import clock
from orthoshard.lab.explain.mesh import described_mesh
from orthoshard.lab.plan.count import Counted, counted
from orthoshard.lab.plan.estimate import Job, times
from orthoshard.lab.plan.measure import measure
from orthoshard.plan import build_plan

BAND = 0.3  # of the measured time
RIVALS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adamw", {"rule": "adamw"}),
    ("muon", {"rule": "muon"}),
    ("dion-1/4", {"rule": "dion", "rank_fraction": 0.25}),
    ("dion-1/16", {"rule": "dion", "rank_fraction": 0.0625}),
    ("dion-tail-1/4", {"rule": "dion_tail", "rank_fraction": 0.25}),
)


def check(shapes: ModelShapes, processes: Sequence[int], threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of processes and each rival."""
    for count in processes:
        others = others_since()
        before = measure(count, threads if count == 1 else 1)
        found = _measured(shapes, count, threads, rounds)
        machines = (before, measure(count, threads if count == 1 else 1))
        share = others()
        mesh = [("fsdp", count)] if count > 1 else []
        # forward and backward are not part of this, so the job does not matter
        job = Job(active=1, ranks=count, tokens_per_step=1, tokens=1, utilization=1, price=0)
        for name, options in RIVALS:
            amounts = amounts_of(shapes, count, options)
            rank = options.get("rank_fraction", 1.0)
            each = [times(amounts.here, mesh, machine.at(rank, amounts.messages), job) for machine in machines]
            predicted = 1e3 * statistics.mean(parts.optimizer for parts in each)
            yield {
                "processes": count,
                "optimizer": name,
                "predicted_ms": predicted,
                "measured_ms": found[name],
                "ratio": predicted / found[name],
                "within": abs(predicted / found[name] - 1) <= BAND,
                "parts_ms": {
                    "products": 1e3 * statistics.mean(parts.products for parts in each),
                    "passes": 1e3 * statistics.mean(parts.passes for parts in each),
                    "wire": 1e3 * statistics.mean(parts.intra + parts.inter for parts in each),
                },
                "collectives": len(amounts.messages),
                "others": share,
                "before_and_after_ms": [1e3 * parts.optimizer for parts in each],
                "machine": before.words[0],
            }


def amounts_of(shapes: ModelShapes, processes: int, options: dict[str, Any]) -> Counted:
    """Return the amounts of a step on the matrices, cut by rows over ``processes`` processes."""
    with described_mesh({"fsdp": processes} if processes > 1 else {}) as mesh:
        parameters: list[tuple[str, nn.Parameter]] = []
        for number, (m, n) in enumerate(shapes.matrices):
            local = torch.empty(-(-m // processes), n)  # on the CPU: costs depend on the device; never touched
            whole = (
                local
                if mesh is None
                else DTensor.from_local(
                    local, mesh, [Shard(0)], run_check=False, shape=torch.Size((m, n)), stride=(n, 1)
                )
            )
            parameters.append((f"w{number}", nn.Parameter(whole)))
        names, members = [name for name, _ in parameters], [parameter for _, parameter in parameters]
        groups = [complete({"params": members, "param_names": names}, {"seed": 0, **options})]
        return counted(build_plan(groups), groups, 1)


def _measured(shapes: ModelShapes, processes: int, threads: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a step, by rival."""
    if processes > 1:
        setting = sharded.Setting(processes, shapes, RIVALS, rounds, seed=0, turns=("sharded",))
        return {name: row["sharded_ms"] for name, row in sharded.measure(setting).items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {name: _one_process(shapes, options, rounds) for name, options in RIVALS}
    finally:
        torch.set_num_threads(before)


def _one_process(shapes: ModelShapes, options: dict[str, Any], rounds: int) -> float:
    optimizer = RuleOptimizer(Workload(shapes, sharded.CPU, torch.float32).parameters(), **options)
    timed = clock(sharded.CPU)
    return statistics.median([timed(optimizer.step) for _ in range(rounds + sharded.WARM_UP)][sharded.WARM_UP :])
