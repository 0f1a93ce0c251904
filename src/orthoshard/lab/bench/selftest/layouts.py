"""Every layout possible with this number of processes, over NCCL or gloo, compared with the float64 run on a CPU.

Under torchrun all ranks make the same checks in the same order, each on its own pieces. A rank sends its result to rank
0 through torchrun's store and not by a collective, so that it can report even if a collective failed. Rank 0 answers
whether to continue. If a rank has failed they stop, because others may still wait for it. May import torch and
``orthoshard``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from orthoshard.lab.bench.selftest.cases import Options, built, exact, nearest, start, train, worst
from orthoshard.lab.bench.selftest.rows import Check, absent, reason_of

F64 = torch.float64
SECTIONS_AT_MOST = timedelta(hours=1)  # for the other sections of rank 0, during which the other ranks wait
A_STEP_AT_MOST = timedelta(seconds=60)
VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}

# All in float64: another order of sums makes errors of 1e-13, a mistake makes errors of about 1.
RULES: Mapping[str, Options] = {
    "dion": {"rule": "dion"},
    "dion, dealt": {"rule": "dion", "shard_compute": "dealt"},
    "dion, q_side columns": {"rule": "dion", "q_side": "columns"},
    "dion_tail": {"rule": "dion_tail"},
    "muon": {"rule": "muon", "polar_dtype": "float64"},
    "normuon": {"rule": "normuon", "polar_dtype": "float64"},
    "adamw": {"rule": "adamw"},
}
# These are the same as others if no matrix is sharded.
OF_PIECES = ("dion, dealt", "dion, q_side columns", "normuon")


@dataclass(frozen=True)
class Layout:
    """A mesh and options. ``places(i)`` are placements of parameter i; none for plain tensors, equal on all ranks."""

    mesh: tuple[int, ...]
    places: Callable[[int], tuple[Placement, ...]]
    options: Options


def possible(world: int) -> dict[str, Layout]:
    """Return the layouts of ``world`` processes, by name."""
    R, rows, columns = Replicate(), Shard(0), Shard(1)
    flat, n = (world,), world
    found = {
        f"fsdp {n}": Layout(flat, lambda i: (rows,), {}),
        f"columns {n}": Layout(flat, lambda i: (columns,), {}),
        f"tp {n}": Layout(flat, lambda i: (rows if i % 2 else columns,), {}),
        f"ddp {n}": Layout(flat, lambda i: (), {}),
        f"ddp {n}, split": Layout(flat, lambda i: (), {"replica_compute": "split"}),
        f"ddp {n}, zero1": Layout(flat, lambda i: (), {"shard_state": "zero1"}),
    }
    if n % 2 == 0 and n >= 4:
        pair, half = (2, n // 2), n // 2
        found |= {
            f"hsdp 2 x {half}": Layout(pair, lambda i: (R, rows), {}),
            f"hsdp 2 x {half}, zero1": Layout(pair, lambda i: (R, rows), {"shard_state": "zero1"}),
            f"fsdp 2 x tp {half}": Layout(pair, lambda i: (rows, columns), {}),
        }
    if n % 4 == 0 and n >= 8:
        found[f"replicas 2 x fsdp 2 x tp {n // 4}"] = Layout((2, 2, n // 4), lambda i: (R, rows, columns), {})
    return found


def rank() -> int:
    """Return the rank of this process among those that torchrun started, or 0 without torchrun."""
    return int(os.environ["RANK"]) if os.environ.keys() >= VARIABLES else 0


def layouts(device: torch.device) -> Iterator[Check]:
    if not os.environ.keys() >= VARIABLES or int(os.environ["WORLD_SIZE"]) < 2:
        yield absent("all", "one process: torchrun --nproc-per-node N -m orthoshard bench --self-test --only layouts")
        return
    ranks = Ranks.enter(device)
    for name, layout in possible(ranks.world).items():
        for rule, options in RULES.items():
            if rule in OF_PIECES and not layout.places(0):
                continue
            if not ranks.in_step:
                yield absent("the rest", "after a failure the ranks are no longer in step")
                return
            run = partial(_error, {**options, **layout.options}, layout, ranks)
            yield Check(f"{rule}, {name}, {ranks.backend}", partial(ranks.together, run))
    ranks.leave()


class Ranks:
    """The processes of torchrun, and how they collect results."""

    def __init__(self, device: torch.device, backend: str, store: Any, rank: int, world: int) -> None:
        self.device, self.backend, self.rank, self.world = device, backend, rank, world
        self._store, self._checks, self.in_step = store, 0, True
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}

    @classmethod
    def enter(cls, device: torch.device) -> Ranks:
        """Enter the process group: NCCL if each process has its own GPU, else gloo."""
        local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "gloo"
        if device.type == "cuda":
            count = torch.cuda.device_count()
            device = torch.device("cuda", local % count)
            torch.cuda.set_device(device)
            backend = "nccl" if beside <= count else "gloo"  # NCCL refuses two ranks on one GPU
        else:
            torch.set_num_threads(1)
        store, rank, world = next(iter(dist.rendezvous("env://")))
        store = dist.PrefixStore("self-test", store)
        if rank == 0:
            store.set("start", "now")
        store.wait(["start"], SECTIONS_AT_MOST)
        own: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=A_STEP_AT_MOST, **own)
        return cls(device, backend, store, rank, world)

    def mesh(self, shape: tuple[int, ...]) -> DeviceMesh:
        if shape not in self._meshes:
            names = ("a", "b", "c")[: len(shape)]
            self._meshes[shape] = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._meshes[shape]

    def together(self, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Call ``measure`` on all ranks, and return the worst result on rank 0, (0, 0) on the others.

        Raises AssertionError on rank 0 if a rank raised, with its message.
        """
        check, self._checks = f"check {self._checks}", self._checks + 1
        try:
            mine = json.dumps(measure())
        except Exception as error:  # rank 0 prints it
            mine = json.dumps(reason_of(error))
        self._store.set(f"{check}, rank {self.rank}", mine)
        if self.rank:
            self._store.wait([f"{check}, on"], 2 * A_STEP_AT_MOST)
            self.in_step = self._store.get(f"{check}, on") == b"yes"
            return 0.0, 0.0
        found: list[tuple[float, float]] = []
        failed: list[str] = []
        for rank in range(self.world):
            key = f"{check}, rank {rank}"
            try:
                self._store.wait([key], 2 * A_STEP_AT_MOST)
                said = json.loads(self._store.get(key))
            except dist.DistStoreError:
                said = "it did not answer"
            if isinstance(said, str):
                failed.append(f"rank {rank}: {said}")
            else:
                found.append((said[0], said[1]))
        self.in_step = not failed
        self._store.set(f"{check}, on", "no" if failed else "yes")
        if failed:
            raise AssertionError("; ".join(failed))
        return nearest(found)

    def leave(self) -> None:
        if self.in_step:
            dist.destroy_process_group()


def _error(options: Options, layout: Layout, ranks: Ranks) -> tuple[float, float]:
    """Return the error of this rank's pieces and its limit, of the parameter whose error is nearest to its limit."""
    mesh = ranks.mesh(layout.mesh)

    def placed(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_place(tensor.to(ranks.device), mesh, layout.places(i)) for i, tensor in enumerate(tensors)]

    weights = [nn.Parameter(weight) for weight in placed(start(F64))]
    group = {} if layout.places(0) else {"process_group": mesh.get_group()}
    optimizer = built(weights, options, **group)
    train(optimizer, weights, F64, placed=placed)
    true = exact(options, F64)
    pairs = zip(weights, placed(true), strict=True)
    errors = [float((_local(weight) - _local(other)).norm()) for weight, other in pairs]
    return worst(optimizer, errors, true, F64, ranks.device)


def _place(whole: Tensor, mesh: DeviceMesh, places: tuple[Placement, ...]) -> Tensor:
    """Shard a tensor without communication: every rank has drawn all of it."""
    return distribute_tensor(whole, mesh, places, src_data_rank=None) if places else whole


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
