"""One step cut over gloo processes beside what it cannot avoid: the one-process step and its collectives alone.

    ratio = sharded step / (one-process step with as many threads as all processes + its collectives, nothing else)

1 would mean that no work is done twice and nothing waits but for the network. The three are measured in turn, in the
same processes; a step ends when the slowest rank has ended. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from orthoshard.engine.comm import Comm, Pending
from orthoshard.lab.bench.contestants import random_gradient
from orthoshard.lab.bench.processes import run_ranks
from orthoshard.layout import Axis
from orthoshard.optimizer import RuleOptimizer

WARM_UP = 2


@dataclass(frozen=True)
class Setting:
    """What every process is told. ``rivals``: names to the options of `RuleOptimizer`. ``turns``: what is timed, in
    turn; ``("sharded",)`` for steps one after the other."""

    processes: int
    threads: int
    matrices: tuple[tuple[int, int], ...]
    rivals: tuple[tuple[str, dict[str, Any]], ...]
    rounds: int
    seed: int
    turns: tuple[str, ...] = ("one_process", "sharded", "collectives")


class Recorder(Comm):
    """Keeps what a step sends, so that it can be sent again with nothing around it."""

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


def measure_sharded(setting: Setting) -> dict[str, Any]:
    """For each rival: medians in ms of the setting's turns, bytes sent, and the ratio where all are timed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        run_ranks(_rank, (setting, folder, str(results)), setting.processes)
        return torch.load(results, weights_only=True)


def _rank(rank: int, setting: Setting, folder: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.processes)
    rows: dict[str, Any] = {}
    for k, (name, options) in enumerate(setting.rivals, 1):
        tell(rank, f"{name}, {k} of {len(setting.rivals)}")
        rows[name] = _rival(rank, setting, options)
    if rank == 0:
        torch.save(rows, results)
    dist.barrier()
    dist.destroy_process_group()


def _rival(rank: int, setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (setting.processes,), mesh_dim_names=("fsdp",))
    cut = RuleOptimizer(_parameters(setting, lambda whole: _shard(whole, mesh, rank)), **options)
    here = rank == 0 and "one_process" in setting.turns
    whole = RuleOptimizer(_parameters(setting, lambda whole: whole), **options) if here else None
    recorder = Recorder()
    for _ in range(WARM_UP):
        cut.step()
    cut._comm, before = recorder, cut._comm
    cut.step()
    tape, sent = recorder.tape, float(recorder.bytes)
    cut._comm = before
    silent = Comm()

    def alone() -> None:
        for send in tape:
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
    row = {**{f"{what}_ms": value for what, value in medians.items()}, "bytes": sent, "times_ms": times}
    if len(medians) == len(calls):
        row["ratio"] = medians["sharded"] / (medians["one_process"] + medians["collectives"])
    return row


def tell(rank: int, what: str) -> None:
    """Say on stderr how far the processes are: one of them."""
    if rank == 0:
        print(f"timing {what}", file=sys.stderr, flush=True)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return (time.perf_counter() - start) * 1e3


def _parameters(setting: Setting, place: Callable[[Tensor], Tensor]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(setting.seed)
    parameters: list[nn.Parameter] = []
    for m, n in setting.matrices:
        parameter = nn.Parameter(place(torch.randn(m, n, generator=generator) * 0.02))
        parameter.grad = place(random_gradient(m, n, "flat", generator, torch.float32))
        parameters.append(parameter)
    return parameters


def _shard(whole: Tensor, mesh: Any, rank: int) -> Tensor:
    """As `fully_shard` cuts: rows, by torch.chunk."""
    chunks = whole.chunk(mesh.size(), 0)
    local = chunks[rank].clone() if rank < len(chunks) else whole[:0].clone()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
