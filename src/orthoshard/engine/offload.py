"""State that lives in host memory: copied to the device for the update that needs it, and back.

While one bucket is updated, the state of the next one is copied to the device, and the state of the previous one back.
On CUDA the copies use pinned memory and one stream for each direction; elsewhere the same calls copy at once. Values
are bitwise those of state on the device. `Lender.finish` waits for the copies back, so that hosts may read
`optimizer.state` after a step. May import torch and this room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .gather import Task


class Lender:
    """The copies of one optimizer. ``copied``: bytes copied so far, both ways; ``lent``: bytes of state on the device
    now; ``most``: the most bytes on the device so far."""

    def __init__(self) -> None:
        self.copied = self.lent = self.most = 0
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def count(self, copied: int, lent: int) -> None:
        """Count more bytes as copied, and more as on the device."""
        self.copied += copied
        self.lent += lent
        self.most = max(self.most, self.lent)

    def streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
        """Return the streams of copies to the device and from it; None if the device has none."""
        if not _has_streams(device):
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def begin(self) -> None:
        """Start a step: let copies to the device wait for those back from the last step."""
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
        """Return the copies, which have been under way since the first call."""
        if self._copies is None:
            self._lender.count(self._bytes, self._bytes)
            streams = self._lender.streams(self._device)
            # allocated on the stream that fills them, so that nothing waits for earlier users of their memory
            with _on(streams[0] if streams else None):
                self._copies = [x.to(self._device, copy=True, non_blocking=True) for x in self._hosts]
            self._there = streams[0].record_event() if streams else None
        return self._copies

    def around(self, updates: Iterable[tuple[Task, int]], following: Loan | None) -> Iterator[tuple[Task, int]]:
        """Yield the updates that work on the copies, which go back when the last update has ended. The
        ``following`` loan starts when the first update has begun. There may be no update: elementwise rules
        step while this list is made."""
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
        """Write the copies back, once the current stream is done with them, and drop them."""
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
