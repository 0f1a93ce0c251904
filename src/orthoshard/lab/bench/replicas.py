"""Steps of replicas with gradients of their own, over a network of known bandwidth, beside what bytes predict.

    predicted = (step - collectives) at no limit + max(8 bytes / bandwidth, collectives at no limit)

Bytes are those that `budget` counts. The collectives of a step alone are as fast as this machine moves data when no
link is in the way: below that time no bandwidth brings them. The rivals step in turn; a step ends when the slowest
replica has ended. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.engine.comm import Comm
from orthoshard.lab.bench.contestants import LR, random_gradient
from orthoshard.lab.bench.processes import run_ranks
from orthoshard.lab.bench.sharded import Recorder, tell, timed
from orthoshard.lab.bench.slow_link import INTERFACE, SlowLink, sent_bytes, slow_link
from orthoshard.optimizer import RuleOptimizer

LEAST_ROUNDS, MOST_ROUNDS = 2, 9
FREE = ("unlimited", "transport")  # what is timed at no limit: the step, and its collectives alone


@dataclass(frozen=True)
class Setting:
    """What every process is told. ``rivals``: names to the options of `RuleOptimizer`; ``bandwidths`` in Mbit/s;
    ``seconds`` for each of them, where ``rounds`` are not given."""

    replicas: int
    threads: int
    matrices: tuple[tuple[int, int], ...]
    rivals: tuple[tuple[str, dict[str, Any]], ...]
    bandwidths: tuple[float, ...]
    rounds: int | None
    seconds: float
    seed: int


def predict(unlimited_ms: float, transport_ms: float, sent: float, mbit: float) -> float:
    """Milliseconds of a step: see the head of the file. ``transport_ms`` is that of the collectives at no limit."""
    return max(unlimited_ms - transport_ms, 0.0) + max(wire_ms(sent, mbit), transport_ms)


def wire_ms(sent: float, mbit: float) -> float:
    return 8 * sent / (mbit * 1e6) * 1e3


def memory_needed(setting: Setting) -> int:
    """About how many bytes all replicas hold at once: weights, gradients, a momentum and a copy of what is sent for
    each rival, and for gradients on their way the sums and the means."""
    elements = sum(m * n for m, n in setting.matrices)
    return 4 * elements * setting.replicas * (4 + 2 * len(setting.rivals))


def measure_replicas(setting: Setting) -> dict[str, Any]:
    """For each rival, the bytes of a step and a point for each bandwidth: times in ms, medians and all."""
    with slow_link(setting.replicas) as link, tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        run_ranks(_rank, (setting, link, folder, str(results)), setting.replicas)
        return torch.load(results, weights_only=True)


def _rank(rank: int, setting: Setting, link: SlowLink, folder: str, results: str) -> None:
    link.enter(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    torch.set_num_threads(setting.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.replicas)

    def limit(mbit: float | None) -> None:
        dist.barrier()
        if rank == 0:
            link.limit(mbit)

    rivals = _rivals(setting, rank)
    rows: dict[str, Any] = {rival.name: {**rival.start(), "points": []} for rival in rivals}
    free = sum(timed(rival.optimizer.step) + timed(rival.collectives) for rival in rivals)
    for k, mbit in enumerate(setting.bandwidths, 1):
        tell(rank, f"at {mbit:g} Mbit/s, {k} of {len(setting.bandwidths)}")
        limited = free + sum(wire_ms(row["bytes"], mbit) for row in rows.values())
        times = _phase(rivals, limit, mbit, _rounds(setting, free + limited))
        free = sum(statistics.median(times[rival.name, what]) for rival in rivals for what in FREE)
        for name, row in rows.items():
            row["points"].append(_point(mbit, row["bytes"], *(times[name, what] for what in (*FREE, "limited"))))
    if rank == 0:
        torch.save(rows, results)
        link.limit(None)
    dist.barrier()
    dist.destroy_process_group()


def _rounds(setting: Setting, expected_ms: float) -> int:
    """As the user says, or as fit into the seconds for a bandwidth."""
    fit = min(max(int(setting.seconds * 1e3 / expected_ms), LEAST_ROUNDS), MOST_ROUNDS)
    rounds = torch.tensor([setting.rounds or fit])
    dist.broadcast(rounds, 0)  # clocks differ
    return int(rounds)


def _phase(
    rivals: Sequence[_Rival], limit: Callable[[float | None], None], mbit: float, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Every round has all calls at no limit and at this one, so that a machine that others use meets all alike."""
    times: dict[tuple[str, str], list[float]] = {(r.name, what): [] for r in rivals for what in (*FREE, "limited")}
    for _ in range(rounds):
        limit(None)
        for rival in rivals:
            times[rival.name, "unlimited"].append(timed(rival.optimizer.step))
            times[rival.name, "transport"].append(timed(rival.collectives))
        limit(mbit)
        for rival in rivals:
            times[rival.name, "limited"].append(timed(rival.optimizer.step))
    return times


def _point(
    mbit: float, sent: float, unlimited: Sequence[float], transport: Sequence[float], limited: Sequence[float]
) -> dict[str, Any]:
    measured, free, moving = (statistics.median(times) for times in (limited, unlimited, transport))
    predicted = predict(free, moving, sent, mbit)
    return {
        "mbit": mbit,
        "measured_ms": measured,
        "predicted_ms": predicted,
        "ratio": predicted / measured,
        "bound_by": "link" if wire_ms(sent, mbit) > moving else "transport",
        "unlimited_ms": free,
        "transport_ms": moving,
        "wire_ms": wire_ms(sent, mbit),
        "times_ms": list(limited),
        "unlimited_times_ms": list(unlimited),
        "transport_times_ms": list(transport),
    }


class _Rival:
    """An optimizer on this replica, and the collectives of one of its steps."""

    def __init__(self, name: str, optimizer: RuleOptimizer) -> None:
        self.name = name
        self.optimizer = optimizer
        self._tape: list[Any] = []

    def start(self) -> dict[str, Any]:
        """A first step, and what the next one sends: as counted, and as the kernel saw it; the most of any replica."""
        self.optimizer.step()
        recorder, before = Recorder(), self.optimizer._comm
        start = sent_bytes()
        self.optimizer._comm = recorder
        self.optimizer.step()
        self.optimizer._comm = before
        on_link, self._tape = sent_bytes() - start, recorder.tape
        plan = self.optimizer.plan()
        counted = step_cost(plan, self.optimizer.param_groups).wire + agreement_bytes(plan)
        assert counted == recorder.bytes
        most = torch.tensor([float(counted), float(on_link)], dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return {"bytes": most[0].item(), "bytes_seen_on_link": most[1].item()}

    def collectives(self) -> None:
        silent = Comm()
        for pending in [send(silent) for send in self._tape]:
            pending.wait()


def _rivals(setting: Setting, rank: int) -> list[_Rival]:
    """All on the same weights, which are equal on all replicas, and gradients, which are not."""
    weights = torch.Generator().manual_seed(setting.seed)
    own = torch.Generator().manual_seed(setting.seed + 1 + rank)
    parameters: list[nn.Parameter] = []
    for m, n in setting.matrices:
        parameter = nn.Parameter(torch.randn(m, n, generator=weights) * 0.02)
        parameter.grad = random_gradient(m, n, "flat", own, torch.float32)
        parameters.append(parameter)
    group = dist.group.WORLD
    return [
        _Rival(name, RuleOptimizer(parameters, lr=LR, process_group=group, **options))
        for name, options in setting.rivals
    ]
