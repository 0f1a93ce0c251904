"""Replicas of a model that hold all state, or only the state of their own matrices: steps, bytes and state of both.

    ratio = step with ``shard_state="zero1"`` / step without

Both take steps in turn, in the same processes, from the same weights with the same gradients. A step ends when the
slowest replica has finished. ``difference`` is the distance between their weights after the last step, as a share of
the distance from the start. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orthoshard.lab.bench.contestants import LR, Workload
from orthoshard.lab.bench.processes import most, over_gloo, tell, timed
from orthoshard.lab.bench.sharded import CPU, WARM_UP, Setting
from orthoshard.optimizer import RuleOptimizer

MODES = ("none", "zero1")
# Multiples of the weights' bytes on each replica: gradients, weights and state of both modes, temporaries of a step.
COPIES = 1 + 2 + 2.5 + 1.5


def memory_needed(setting: Setting) -> int:
    return int(setting.processes * COPIES * 4 * setting.shapes.elements)


def measure(setting: Setting) -> dict[str, Any]:
    """Return for each rival: ``ms``, ``times_ms``, ``bytes`` sent and ``state`` of each mode; ``ratio`` of medians;
    ``difference`` of weights."""
    return over_gloo(_measure, (setting,), setting.processes)


def _measure(setting: Setting) -> dict[str, Any]:
    work = Workload(setting.shapes, CPU, torch.float32, seed=setting.seed)
    rows: dict[str, Any] = {}
    for k, (name, options) in enumerate(setting.rivals, 1):
        tell(f"{name}, {k} of {len(setting.rivals)}")
        rows[name] = _rival(work, setting.rounds, options)
    return rows


def _rival(work: Workload, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    weights = {mode: work.parameters() for mode in MODES}
    group = dist.group.WORLD
    both = {
        mode: RuleOptimizer(weights[mode], lr=LR, process_group=group, shard_state=mode, **options) for mode in MODES
    }
    for _ in range(WARM_UP):
        for optimizer in both.values():
            optimizer.step()
    amounts = {mode: most([_bytes_of_a_step(optimizer), _state(optimizer)]) for mode, optimizer in both.items()}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, optimizer in both.items():
            times[mode].append(timed(optimizer.step))
    row: dict[str, Any] = {
        mode: {"ms": statistics.median(times[mode]), "bytes": sent, "state": state, "times_ms": times[mode]}
        for mode, (sent, state) in amounts.items()
    }
    apart = _distance(weights["none"], weights["zero1"]) / _distance(weights["none"], work.parameters())
    return {**row, "ratio": row["zero1"]["ms"] / row["none"]["ms"], "difference": most([apart])[0]}


def _bytes_of_a_step(optimizer: RuleOptimizer) -> float:
    before = optimizer.bytes_sent
    optimizer.step()
    return float(optimizer.bytes_sent - before)


def _state(optimizer: RuleOptimizer) -> float:
    """Return the bytes of state that this process holds."""
    held = [value for state in optimizer.state.values() for value in state.values()]
    return float(sum(value.numel() * value.element_size() for value in held))


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return float(torch.stack([(p.detach() - q.detach()).norm() for p, q in zip(some, others, strict=True)]).norm())
