"""A step that is sharded over gloo processes, compared with its unavoidable parts: one-process step and collectives.

    ratio = sharded step / (one-process step with as many threads as all processes + its collectives alone)

A ratio of 1 means that no work is done twice, and that ranks wait only for the network. The three are measured in turn,
in the same processes. A step ends when the slowest rank has finished. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from orthoshard.engine.comm import Comm, Pending
from orthoshard.lab.bench.contestants import Workload
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.processes import over_gloo, tell, timed
from orthoshard.layout import Axis
from orthoshard.optimizer import RuleOptimizer

CPU = torch.device("cpu")
WARM_UP = 2
Rivals = tuple[tuple[str, dict[str, Any]], ...]  # names, and the options of `RuleOptimizer`


@dataclass(frozen=True)
class Setting:
    """The settings that every process gets.

    Args:
        threads: threads of the one-process step.
        turns: what is timed, in turn; ``("sharded",)`` for sharded steps without the others between them.
    """

    processes: int
    shapes: ModelShapes
    rivals: Rivals
    rounds: int
    seed: int
    threads: int = 1
    turns: tuple[str, ...] = ("one_process", "sharded", "collectives")


class Recorder(Comm):
    """Records the collectives of a step, so that they can be repeated alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Callable[[Comm], Pending]] = []

    def all_reduce(self, x: Tensor, axis: Axis, op: str = "sum") -> Pending:
        again = torch.zeros_like(x)
        self.tape.append(lambda comm: comm.all_reduce(again, axis, op))
        return super().all_reduce(x, axis, op)

    def all_to_all(self, out: Tensor, x: Tensor, receive: Sequence[int], send: Sequence[int], axis: Axis) -> Pending:
        into, again = torch.zeros_like(out), torch.zeros_like(x)
        self.tape.append(lambda comm: comm.all_to_all(into, again, receive, send, axis))
        return super().all_to_all(out, x, receive, send, axis)

    def reduce_scatter(self, out: Tensor, x: Tensor, axis: Axis) -> Pending:
        into, again = torch.zeros_like(out), torch.zeros_like(x)
        self.tape.append(lambda comm: comm.reduce_scatter(into, again, axis))
        return super().reduce_scatter(out, x, axis)

    def all_gather(self, out: Tensor, x: Tensor, axis: Axis) -> Pending:
        into, again = torch.zeros_like(out), torch.zeros_like(x)
        self.tape.append(lambda comm: comm.all_gather(into, again, axis))
        return super().all_gather(out, x, axis)


def recorded_step(optimizer: RuleOptimizer) -> Recorder:
    """Take a step, and return its collectives."""
    recorder, before = Recorder(), optimizer._comm
    optimizer._comm = recorder
    optimizer.step()
    optimizer._comm = before
    return recorder


def measure(setting: Setting) -> dict[str, Any]:
    """Return for each rival medians in ms of the setting's turns, bytes sent, and the ratio if all turns are timed."""
    return over_gloo(_measure, (setting,), setting.processes)


def _measure(setting: Setting) -> dict[str, Any]:
    work = Workload(setting.shapes, CPU, torch.float32, seed=setting.seed)
    rows: dict[str, Any] = {}
    for k, (name, options) in enumerate(setting.rivals, 1):
        tell(f"{name}, {k} of {len(setting.rivals)}")
        rows[name] = _rival(work, setting, options)
    return rows


def _rival(work: Workload, setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    cut = RuleOptimizer(_cut(work.parameters()), **options)
    here = dist.get_rank() == 0 and "one_process" in setting.turns
    whole = RuleOptimizer(work.parameters(), **options) if here else None
    for _ in range(WARM_UP):
        cut.step()
    recorder, silent = recorded_step(cut), Comm()

    def alone() -> None:
        for send in recorder.tape:
            send(silent).wait()

    def one_process() -> None:
        if whole is not None:
            torch.set_num_threads(setting.threads)
            whole.step()
            torch.set_num_threads(1)

    calls = {"one_process": one_process, "sharded": cut.step, "collectives": alone}
    times: dict[str, list[float]] = {what: [] for what in setting.turns}
    for turn in range(setting.rounds + WARM_UP):
        for what in setting.turns:
            spent = timed(calls[what])
            if turn >= WARM_UP:
                times[what].append(spent)
    medians = {what: statistics.median(spent) for what, spent in times.items()}
    row = {**{f"{what}_ms": value for what, value in medians.items()}, "bytes": float(recorder.bytes)}
    if len(medians) == len(calls):
        row["ratio"] = medians["sharded"] / (medians["one_process"] + medians["collectives"])
    return {**row, "times_ms": times}


def _cut(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters sharded as `fully_shard` does: by rows, like torch.chunk."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))

    def piece(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    cut: list[nn.Parameter] = []
    for whole in parameters:
        assert whole.grad is not None
        cut.append(nn.Parameter(piece(whole.detach())))
        cut[-1].grad = piece(whole.grad)
    return cut
