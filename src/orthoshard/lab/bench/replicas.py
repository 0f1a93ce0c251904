"""Steps of replicas with their own gradients, over a network of known bandwidth, and a prediction from the bytes sent.

    predicted = (step - collectives) without limit + max(8 bytes / bandwidth, collectives without limit)

`budget` counts the bytes. The collectives of a step, run alone without a limit, show how fast this machine can move the
data; no bandwidth makes them faster. The rivals take steps in turn. A step ends when the slowest replica has finished.
May import torch and ``orthoshard``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.engine.comm import Comm
from orthoshard.lab.bench.contestants import LR, Workload
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.processes import most, over_gloo, tell, timed
from orthoshard.lab.bench.sharded import CPU, Rivals, recorded_step
from orthoshard.lab.bench.slow_link import SlowLink, sent_bytes, slow_link
from orthoshard.optimizer import RuleOptimizer

LEAST_ROUNDS, MOST_ROUNDS = 2, 9
FREE = ("unlimited", "transport")  # timed without a limit: the step, and its collectives alone


@dataclass(frozen=True)
class Setting:
    """The settings that every process gets.

    Args:
        bandwidths: in Mbit/s.
        seconds: time for each bandwidth, if ``rounds`` is None.
    """

    replicas: int
    shapes: ModelShapes
    rivals: Rivals
    rounds: int | None
    seed: int
    threads: int
    bandwidths: tuple[float, ...]
    seconds: float


def predict(unlimited_ms: float, transport_ms: float, sent: float, mbit: float) -> float:
    """Return the predicted milliseconds of a step, by the formula at the head of the file.

    ``transport_ms`` is the time of the collectives without a limit.
    """
    return max(unlimited_ms - transport_ms, 0.0) + max(wire_ms(sent, mbit), transport_ms)


def wire_ms(sent: float, mbit: float) -> float:
    """Return the milliseconds that ``sent`` bytes take at ``mbit`` Mbit/s."""
    return 8 * sent / (mbit * 1e6) * 1e3


def memory_needed(setting: Setting) -> int:
    """Return about how many bytes all replicas hold at once: weights, gradients, sums and means of gradients in
    transit, and for each rival a momentum and a copy of what it sends."""
    return 4 * setting.shapes.elements * setting.replicas * (4 + 2 * len(setting.rivals))


def measure(setting: Setting) -> dict[str, Any]:
    """Return for each rival the bytes of a step, and for each bandwidth a point: all times and medians, in ms."""
    with slow_link(setting.replicas) as link:
        return over_gloo(_measure, (setting, link), setting.replicas, link.enter)


def _measure(setting: Setting, link: SlowLink) -> dict[str, Any]:
    torch.set_num_threads(setting.threads)

    def limit(mbit: float | None) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            link.limit(mbit)

    rivals = _rivals(setting)
    rows: dict[str, Any] = {rival.name: {**rival.start(), "points": []} for rival in rivals}
    free = sum(timed(rival.optimizer.step) + timed(rival.collectives) for rival in rivals)
    for k, mbit in enumerate(setting.bandwidths, 1):
        tell(f"at {mbit:g} Mbit/s, {k} of {len(setting.bandwidths)}")
        limited = free + sum(wire_ms(row["bytes"], mbit) for row in rows.values())
        times = _phase(rivals, limit, mbit, _rounds(setting, free + limited))
        free = sum(statistics.median(times[rival.name, what]) for rival in rivals for what in FREE)
        for name, row in rows.items():
            row["points"].append(_point(mbit, row["bytes"], *(times[name, what] for what in (*FREE, "limited"))))
    limit(None)
    return rows


def _rounds(setting: Setting, expected_ms: float) -> int:
    """Return the number of rounds: as the user says, or as many as fit into the seconds for a bandwidth."""
    fit = min(max(int(setting.seconds * 1e3 / expected_ms), LEAST_ROUNDS), MOST_ROUNDS)
    rounds = torch.tensor([setting.rounds or fit])
    dist.broadcast(rounds, 0)  # the clocks of the processes differ
    return int(rounds)


def _phase(
    rivals: Sequence[_Rival], limit: Callable[[float | None], None], mbit: float, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Return all times. Every round has all calls without a limit and at ``mbit``, so other load affects all alike."""
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
        """Take a first step, and record a second one.

        Return the bytes that the second step sends, as counted and as seen by the kernel: the most of any replica.
        """
        self.optimizer.step()
        start = sent_bytes()
        recorder = recorded_step(self.optimizer)
        on_link, self._tape = sent_bytes() - start, recorder.tape
        plan = self.optimizer.plan()
        counted = step_cost(plan, self.optimizer.param_groups).wire + agreement_bytes(plan)
        assert counted == recorder.bytes
        sent, seen = most([float(counted), float(on_link)])
        return {"bytes": sent, "bytes_seen_on_link": seen}

    def collectives(self) -> None:
        silent = Comm()
        for pending in [send(silent) for send in self._tape]:
            pending.wait()


def _rivals(setting: Setting) -> list[_Rival]:
    """Return all rivals, on the same weights, which are equal on all replicas, and the same gradients, which differ."""
    parameters = Workload(setting.shapes, CPU, torch.float32, seed=setting.seed + dist.get_rank()).parameters()
    group = dist.group.WORLD
    return [
        _Rival(name, RuleOptimizer(parameters, lr=LR, process_group=group, **options))
        for name, options in setting.rivals
    ]
