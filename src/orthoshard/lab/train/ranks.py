"""The ranks of one run, and how they agree. With one process no agreement is needed.

    world = dp x fsdp x tp        the mesh, tp innermost; a place in dp x fsdp is a *data rank*: it reads its own part
                                  of every batch. Ranks that differ only in tp see the same data.

Ranks agree over CPU groups (gloo) of their own, separate from those of the training, so no device is needed. They also
share errors: if one rank fails, all raise the same sentence, and none waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from orthoshard.lab.train.config import MachineConfig
from orthoshard.lab.train.errors import UserError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class ControlGroup:
    """Agreement of all ranks of a process group. None: this process is the only one."""

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def together(self, action: Callable[[], T]) -> T:
        """Call ``action`` on every rank and return its result. If it fails on any rank, all raise.

        A failed rank raises its own error, the others a ``UserError`` with the message of the first failed rank.
        """
        if self.group is None:
            return action()
        error: BaseException | None = None
        result: T | None = None
        try:
            result = action()
        except (Exception, CheckpointException) as caught:
            error = caught
        sentence = None if error is None else str(error)
        if error is not None and not isinstance(error, UserError):
            sentence = f"rank {self.rank} failed: {type(error).__name__}: {first_line(error)}"
        sentences: list[str | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(sentences, sentence, group=self.group)
        if error is not None:
            raise error
        for found in sentences:
            if found is not None:
                raise UserError(found)
        return cast("T", result)

    def first(self, action: Callable[[], T]) -> T:
        """Call ``action`` on rank 0 only, and return its result on all ranks. If it fails, all raise."""
        result = self.together(lambda: action() if self.rank == 0 else None)
        return self.tell(cast("T", result))

    def tell(self, value: T) -> T:
        """Return the ``value`` of rank 0."""
        if self.group is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=dist.get_global_rank(self.group, 0), group=self.group)
        return held[0]

    def sums(self, values: Iterable[float]) -> list[float]:
        """Return the sum of each value over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        return [value > 0 for value in self._reduced(map(float, flags), dist.ReduceOp.MAX)]

    def _reduced(self, values: Iterable[float], op: Any) -> list[float]:
        vector = torch.tensor(list(values), dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(vector, op, group=self.group)
        return vector.tolist()


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, and the place of this process among them.

    Args:
        control: for agreement in the main thread.
        aside: for agreement in the thread that writes checkpoints.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    mesh: DeviceMesh | None = None
    control: ControlGroup = ControlGroup()
    aside: ControlGroup = ControlGroup()

    @property
    def world(self) -> int:
        return self.dp * self.fsdp * self.tp

    @property
    def data(self) -> int:
        """Number of parts into which a batch is cut."""
        return self.dp * self.fsdp

    @property
    def place(self) -> int:
        """Index of this rank's part."""
        return self.control.rank // self.tp

    @property
    def is_first(self) -> bool:
        return self.control.rank == 0


ALONE = Ranks()


def make_ranks(config: MachineConfig, device: torch.device) -> Ranks:
    """Return the ranks of the default process group, or ``ALONE`` for one process.

    Raises ``UserError`` if the settings ask for another number of processes.
    """
    started = dist.get_world_size() if dist.is_initialized() else 1
    wanted = config.dp * config.fsdp * config.tp
    if wanted != started:
        flags = f"--dp {config.dp} x --fsdp {config.fsdp} x --tp {config.tp} make {wanted} processes"
        if started == 1:
            raise UserError(
                f"{flags}, but this is one: start it by torchrun --nproc-per-node {wanted} -m orthoshard train ..., or "
                "give --dp 1 --fsdp 1 --tp 1."
            )
        raise UserError(f"{flags}, and torchrun started {started}: make the product {started}, such as --dp {started}.")
    if started == 1:
        return ALONE
    mesh = init_device_mesh(device.type, (config.dp, config.fsdp, config.tp), mesh_dim_names=("dp", "fsdp", "tp"))
    timeout = timedelta(seconds=config.timeout)
    groups = [cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=timeout)) for _ in range(2)]
    return Ranks(config.dp, config.fsdp, config.tp, mesh, ControlGroup(groups[0]), ControlGroup(groups[1]))
