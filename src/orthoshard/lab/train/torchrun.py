"""The processes that torchrun started for one command. They enter a process group, and one of them prints messages.

torch is imported only under torchrun, so that a command of one process starts quickly.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from orthoshard.lab.train.errors import first_line

if TYPE_CHECKING:
    from orthoshard.lab.train.ranks import ControlGroup

T = TypeVar("T")
SAID = "orthoshard said"
MARKS = ("gloo", "Gloo", "NCCL", "Connection", "Timed out", "timed out", "Broken pipe", "the optimizer waited for")
PATIENCE_SECONDS = 3.0  # rank 0, which hosts the store, waits so long for the others to use it


def started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def restarts() -> int:
    """Return how often torchrun has restarted the command."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if started_by_torchrun() else 0


@dataclass
class Torchrun:
    rank: int
    world: int
    control: ControlGroup
    _store: Any
    _asked: bool = False

    @classmethod
    def enter(cls, timeout: float) -> Torchrun:
        """Join the process group for which torchrun set the environment: gloo, and nccl if there are GPUs."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from orthoshard.lab.train.ranks import ControlGroup

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        store = dist.distributed_c10d._get_default_store()
        return cls(dist.get_rank(), dist.get_world_size(), ControlGroup(group), store)

    def first(self, action: Callable[[], T]) -> T:
        """Call ``action`` on rank 0 only, and return its result on all ranks. If it fails, all raise."""
        return self.control.first(action)

    @contextmanager
    def quiet(self) -> Generator[None]:
        """Let only rank 0 print what every process would print (help, the error for a misspelt flag).

        On ``SystemExit``, note it in the store, where `leave` waits for all: torchrun ends all when one has failed.
        """
        try:
            if self.rank == 0:
                yield
            else:
                with (
                    open(os.devnull, "w", encoding="utf-8") as nowhere,
                    redirect_stdout(nowhere),
                    redirect_stderr(nowhere),
                ):
                    yield
        except SystemExit:
            sys.stderr.flush()
            self.speaks()
            raise

    def speaks(self) -> bool:
        """Return whether this process is the first to call this, so that only one reports a failure of many."""
        self._asked = True
        try:
            return int(self._store.add(SAID, 1)) == 1
        except RuntimeError:  # rank 0 hosted the store, and is gone
            return False

    def lost(self, error: BaseException) -> bool:
        """Return whether torch raises such an ``error`` if another process is gone or does not answer."""
        return any(mark in str(error) for mark in MARKS)

    def loss_message(self, error: BaseException) -> str:
        """Return one line that says that another process is gone."""
        return (
            f"rank {self.rank} of {self.world} ended, because another process is gone or did not answer within "
            f"--timeout: {first_line(error)}"
        )

    def done(self) -> None:
        """Destroy the process group, after a run without an error."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def leave(self) -> None:
        """Wait a little for the others if this process has failed: torchrun ends all as soon as one has exited."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while self._asked and int(self._store.add(SAID, 0)) < self.world and time.monotonic() < deadline:
                time.sleep(0.02)
        except RuntimeError:
            return
