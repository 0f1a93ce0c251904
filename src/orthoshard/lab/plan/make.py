"""A plan: the amounts of every contestant for a model, a mesh and a machine, and the time, memory and cost from them.

May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import torch

from orthoshard.lab.explain.mesh import check_sizes, described_mesh
from orthoshard.lab.plan.contestants import DEALT, Contestant, contestants
from orthoshard.lab.plan.count import counted
from orthoshard.lab.plan.estimate import Amounts, Job, Times, cost, days, links, times
from orthoshard.lab.plan.hardware import Hardware
from orthoshard.lab.plan.subject import Placed, Subject
from orthoshard.lab.train.optimizers import plugged_in


@dataclass(frozen=True)
class Line:
    """One row.

    Args:
        amounts, times: those of rank 0, but with the mean flops over ranks if that is more.
        mean: times with the mean amounts over ranks.
        memory: bytes that rank 0 needs for weights, gradients, state and temporaries.
        sync_link: link of the axis dp.
    """

    contestant: Contestant
    amounts: Amounts
    times: Times
    mean: Times
    memory: float
    fits: bool
    days: float
    cost: float
    sync_link: str

    def plain(self, link: dict[str, str]) -> dict[str, Any]:
        """Return the row as plain values for JSON. ``link`` gives the link of each axis."""
        mine = self.contestant
        sent: dict[str, float] = {"intra": 0.0, "inter": 0.0}
        for axis, size in self.amounts.sent.items():
            sent[link[axis]] += size
        return {
            "name": mine.name,
            **asdict(mine.row),
            "fits": self.fits,
            "memory": self.memory,
            **asdict(self.amounts),
            "traffic": self.amounts.touched + self.amounts.passes,
            "sent_by_link": sent,
            "averaged": sum(self.amounts.synced.values()),
            "seconds": {**asdict(self.times), "optimizer": self.times.optimizer, "step": self.times.step},
            "mean_seconds": {**asdict(self.mean), "optimizer": self.mean.optimizer, "step": self.mean.step},
            "overhead": self.times.overhead,
            "days": self.days,
            "cost": self.cost,
        }


@dataclass(frozen=True)
class Planned:
    subject: Subject
    sizes: dict[str, int]
    hardware: Hardware
    job: Job
    lines: tuple[Line, ...]

    @property
    def mesh(self) -> list[tuple[str, int]]:
        return list(self.sizes.items())

    @property
    def links(self) -> dict[str, str]:
        return links(self.mesh, self.hardware.machine.per_node)


def make(
    subject: Subject,
    sizes: dict[str, int],
    hardware: Hardware,
    job: Job,
    ranks: Sequence[Fraction],
    step: Callable[[str, float], object] = lambda name, share: None,
) -> Planned:
    """Return the plan. ``step`` is called with the name of each contestant and the finished share.

    Raises ValueError if the mesh has an axis that cannot cut anything in the model, or if no row fits into memory.
    """
    lines, rows, mesh = dict[str, Line](), contestants(sizes, ranks, plugged_in()), list(sizes.items())
    with described_mesh(sizes) as described:
        for own in (False, True):
            chosen = [row for row in rows if row.own_gradients == own]
            if not chosen:
                continue
            placed = subject.place(described, own)
            weights = _local_bytes(placed)
            for row in chosen:
                step(row.name, len(lines) / len(rows))
                plan, groups = placed.plan(row.row.rule, **row.options)
                found = counted(plan, groups, sizes.get("dp", 1))
                lines[row.name] = _line(row, found.here, found.mean, found.messages, weights, mesh, hardware, job)
    weights = min(line.memory - line.amounts.state - line.amounts.temporaries for line in lines.values()) / 2
    planned = tuple(lines[row.name] for row in rows if not _said_before(lines, row))
    _refuse_impossible(planned, hardware, weights, subject)
    return Planned(subject, sizes, hardware, job, planned)


def _line(
    row: Contestant,
    here: Amounts,
    mean: Amounts,
    messages: Sequence[float],
    weights: float,
    mesh: Sequence[tuple[str, int]],
    hardware: Hardware,
    job: Job,
) -> Line:
    machine = hardware.at(row.row.rank, messages)
    here = replace(here, flops=max(here.flops, mean.flops))
    spent = times(here, mesh, machine, job)
    memory = 2 * weights + here.state + here.temporaries
    run = days(spent.step, job)
    average = times(mean, mesh, machine, job)
    link = links(mesh, hardware.machine.per_node).get("dp", "inter")
    return Line(row, here, spent, average, memory, memory <= hardware.machine.capacity, run, cost(run, job), link)


def _said_before(lines: dict[str, Line], row: Contestant) -> bool:
    """Return whether this row deals whole matrices and the automatic choice does so too, with the same figures."""
    automatic = lines[row.name.removesuffix(DEALT)]
    return row.row.shards == "dealt" and replace(automatic, contestant=row) == lines[row.name]


def _local_bytes(placed: Placed) -> float:
    """Return the bytes of the weights on this rank."""
    return sum(
        getattr(p, "_local_tensor", p).numel() * p.element_size()
        for p in {id(p): p for p in placed.module.parameters()}.values()
    )


def _refuse_impossible(lines: Sequence[Line], hardware: Hardware, weights: float, subject: Subject) -> None:
    if any(line.fits for line in lines):
        return
    least = min(lines, key=lambda line: line.memory)
    capacity = hardware.machine.capacity
    raise ValueError(
        f"{subject.described.name} does not fit: on this mesh a rank needs {2 * weights / 1e9:.3g} GB for weights and "
        f"gradients and {(least.memory - 2 * weights) / 1e9:.3g} GB for the state and temporaries of the smallest "
        f"optimizer ({least.contestant.name}), and {hardware.name} has {capacity / 1e9:.3g} GB; shard it over about "
        f"{least.memory / capacity:.2g} times as many ranks (a larger fsdp or tp)"
    )


def check_mesh(sizes: dict[str, int], subject: Subject, per_node: int) -> None:
    """Check that the mesh fills whole nodes, and divides heads and experts. Raises ValueError."""
    ranks = prod(sizes.values())
    if ranks > per_node and ranks % per_node:
        raise ValueError(
            f"{ranks} ranks do not fill nodes of {per_node}: choose sizes whose product is a multiple of {per_node}, "
            f"or give the number of ranks per node by --per-node"
        )
    described = subject.described
    experts = [p for p in subject.module.parameters() if id(p) in subject.experts]
    check_sizes(sizes, described.name, described.settings, experts)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
