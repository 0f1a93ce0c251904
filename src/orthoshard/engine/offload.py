"""State that lives in host memory: copied to the device for the update that needs it, and back.

The state of the next bucket is on its way while this one's is worked on, and what has been worked on is on its way
back: on CUDA from and into pinned memory, each way on a stream of its own; elsewhere by the same calls, at once. The
values are those of state on the device, to the bit. `Lender.finish` waits for what is on its way back, so that hosts
may read `optimizer.state` after a step. May import torch and this room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .gather import Task


class Lender:
    """The copies of one optimizer. ``copied``: bytes, both ways, so far; ``lent``: bytes of state on the device now;
    ``most``: at most so far."""

    def __init__(self) -> None:
        self.copied = self.lent = self.most = 0
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def count(self, copied: int, lent: int) -> None:
        """So many bytes more are copied, and so many more on the device."""
        self.copied += copied
        self.lent += lent
        self.most = max(self.most, self.lent)

    def streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
        """The streams of copies to the device and from it; None where there are none."""
        if not _has_streams(device):
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def begin(self) -> None:
        """Before a step: what it reads has come back from the last one."""
        for there, back in self._streams.values():
            there.wait_stream(back)

    def finish(self) -> None:
        """Wait until all state is back."""
        for _, back in self._streams.values():
            back.synchronize()


class Loan:
    """Copies of host tensors on a device."""

    def __init__(self, lender: Lender, hosts: Sequence[Tensor], device: torch.device) -> None:
        self._lender, self._hosts, self._device = lender, hosts, device
        self._bytes = sum(x.numel() * x.element_size() for x in hosts)
        self._copies: list[Tensor] | None = None
        self._there: Any = None  # an event

    def start(self) -> list[Tensor]:
        """The copies, on their way since this was called first."""
        if self._copies is None:
            self._lender.count(self._bytes, self._bytes)
            streams = self._lender.streams(self._device)
            # allocated by the stream that fills them, so that nothing has to wait for what used their memory before
            with _on(streams[0] if streams else None):
                self._copies = [x.to(self._device, copy=True, non_blocking=True) for x in self._hosts]
            self._there = streams[0].record_event() if streams else None
        return self._copies

    def around(self, updates: Iterable[tuple[Task, int]], following: Loan | None) -> Iterator[tuple[Task, int]]:
        """The updates that work on the copies, which go back when the last one has ended. The ``following`` loan is on
        its way once the first one has begun. There may be none: elementwise rules step while they are made."""
        copies = self.start()
        if self._there is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._there)
            for copy in copies:
                copy.record_stream(current)
        tasks = list(updates)
        if not tasks:
            self._give_back()
        self._open = len(tasks)
        for number, (task, size) in enumerate(tasks):
            yield self._around(task, None if number else following), size

    def _around(self, task: Task, following: Loan | None) -> Task:
        if following is not None:
            following.start()
        yield from task
        self._open -= 1
        if not self._open:
            self._give_back()

    def _give_back(self) -> None:
        """Write the copies back, once what the current stream does with them is done, and let go of them."""
        streams = self._lender.streams(self._device)
        if streams:
            streams[1].wait_stream(torch.cuda.current_stream(self._device))
        with _on(streams[1] if streams else None):
            for host, copy in zip(self._hosts, self.start(), strict=True):
                host.copy_(copy, non_blocking=True)
                if streams:
                    copy.record_stream(streams[1])
        self._lender.count(self._bytes, -self._bytes)
        self._copies = []


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream) if stream else nullcontext()


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()
