"""Calls on r x r matrices of several updates, done as one when the first of them needs its results.

So the updates in flight, up to `run.IN_FLIGHT`, share the launches of their work on r x r matrices, whatever their m
and n. It is another thing to wait for, like a collective, and each rank waits as often, but for itself alone.
May import torch, `linalg.small`, `comm` and `gather`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from torch import Tensor

from ..linalg.small import BatchedCall, run_batched
from .comm import Pending
from .gather import Task


class PendingCall(Pending):
    """A step that is done when somebody waits for it or for another of its kind; then there are ``results``."""

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
    """The steps of one optimizer's step that are still to be done."""

    def __init__(self) -> None:
        self._open: defaultdict[Hashable, list[PendingCall]] = defaultdict(list)

    def to(self, step: BatchedCall) -> Task:
        """The results of a step, when its update's turn comes."""
        alike = self._open[step.kind]
        call = PendingCall(step, alike)
        alike.append(call)
        yield call
        return call.results
