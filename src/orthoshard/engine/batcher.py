"""Calls on r x r matrices of several updates, done as one when the first of the updates needs its results.

The updates in flight, up to `run.IN_FLIGHT`, thus share the launches of their work on r x r matrices, whatever their m
and n. An update waits for such a call as it waits for a collective, and equally often on every rank, but a call
involves no other rank. May import torch, `linalg.small`, `comm` and `gather`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from torch import Tensor

from ..linalg.small import BatchedCall, run_batched
from .comm import Pending
from .gather import Task


class PendingCall(Pending):
    """A call that is done when an update waits for it or for another call of its kind; its ``results`` are set then."""

    def __init__(self, step: BatchedCall, alike: list[PendingCall]) -> None:
        super().__init__(None, "")
        self.step = step
        self.results: tuple[Tensor, ...] = ()
        self._alike = alike

    def wait(self) -> None:
        if self.results:
            return
        alike = [*self._alike]
        self._alike.clear()
        for call, results in zip(alike, run_batched([call.step for call in alike]), strict=True):
            call.results = results


class CallBatcher:
    """The calls of one optimizer step that are still to be done."""

    def __init__(self) -> None:
        self._open: defaultdict[Hashable, list[PendingCall]] = defaultdict(list)

    def to(self, step: BatchedCall) -> Task:
        """Add a call to those waiting, and return its results when its update's turn comes."""
        alike = self._open[step.kind]
        call = PendingCall(step, alike)
        alike.append(call)
        yield call
        return call.results
