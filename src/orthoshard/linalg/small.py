"""Steps of an algorithm on r x r matrices, yielded so that the caller may do those of several batches at once.

On a device a call on (b, r, r) costs its launch, whatever b is, and factors of Gram matrices take many calls. So an
algorithm may be a generator that yields such a step,

    x, noise = yield BatchedCall(next_factor, (gram, noise), (torch.float32,))

`run_batched` does the calls of all batches that have reached the same step, however many rows are behind their
matrices. May import torch and `linalg.host_sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthoshard.linalg.host_sync import dry_once


@dataclass(frozen=True, slots=True)
class BatchedCall:
    """``f(*inputs, *options)``, a tuple of tensors. All tensors have the batch first, and each matrix is treated by
    itself. ``f`` may overwrite its inputs, so a step is done once."""

    f: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    options: tuple[Hashable, ...] = ()

    @property
    def kind(self) -> Hashable:
        """A key that is equal for steps that may be done together."""
        return self.f, self.options, tuple((x.shape[1:], x.dtype, x.device) for x in self.inputs)

    def done(self) -> tuple[Tensor, ...]:
        return dry_once(self.f)(*self.inputs, *self.options)


# A generator that yields steps, is sent their results, and returns P.
Work = Generator[BatchedCall, tuple[Tensor, ...], Tensor]


def run_batched(steps: Sequence[BatchedCall]) -> list[tuple[Tensor, ...]]:
    """Return the results of steps of one kind, from one call."""
    first = steps[0]
    if len(steps) == 1:
        return [first.done()]
    inputs = tuple(torch.cat(each) for each in zip(*(step.inputs for step in steps), strict=True))
    sizes = [step.inputs[0].shape[0] for step in steps]
    results = BatchedCall(first.f, inputs, first.options).done()
    return list(zip(*(each.split(sizes) for each in results), strict=True))


def at_once(f: Callable[..., Tensor]) -> Callable[..., Work]:
    """Make of a function ``f`` of a batch a generator without steps. ``f`` is also called for no matrices, so that the
    result has the dtype that other ranks send."""

    def work(x: Tensor, *args: Any) -> Work:
        return f(x, *args)
        yield

    return work


def answered(
    algorithm: Generator[Any, Any, Tensor], kind: type, answer: Callable[[Any], Any]
) -> Generator[Any, Any, Tensor]:
    """Run ``algorithm``, answering yields of this ``kind`` and passing all others on."""
    try:
        request = next(algorithm)
        while True:
            request = algorithm.send(answer(request) if isinstance(request, kind) else (yield request))
    except StopIteration as stop:
        return stop.value


def finished(algorithm: Generator[Any, Any, Tensor]) -> Tensor:
    """Return the result of an algorithm that has nothing left to answer."""
    try:
        request = next(algorithm)
    except StopIteration as stop:
        return stop.value
    raise AssertionError(f"{request} is left without an answer")
