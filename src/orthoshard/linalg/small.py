"""Steps of an algorithm on r x r matrices, yielded so that whoever runs it may do them for several batches at once.

On a device a call on (b, r, r) costs its launch, whatever b is, and factors of Gram matrices take many calls. So an
algorithm that comes to such a step may yield it, as a generator,

    x, noise = yield BatchedCall(next_factor, (gram, noise), (torch.float32,))

`run_batched` does the calls of all batches that came to the same one, whatever the rows behind their matrices.
May import torch and `linalg.host_sync`.
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
    """``f(*inputs, *options)``, a tuple of tensors: all tensors with the batch first, each matrix by itself. ``f`` may
    use up its inputs, so that a step is done once."""

    f: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    options: tuple[Hashable, ...] = ()

    @property
    def kind(self) -> Hashable:
        """Equal where steps may be done together."""
        return self.f, self.options, tuple((x.shape[1:], x.dtype, x.device) for x in self.inputs)

    def done(self) -> tuple[Tensor, ...]:
        return dry_once(self.f)(*self.inputs, *self.options)


# Yields steps and is sent their results; returns P.
Work = Generator[BatchedCall, tuple[Tensor, ...], Tensor]


def run_batched(steps: Sequence[BatchedCall]) -> list[tuple[Tensor, ...]]:
    """The results of steps of one kind, from one call."""
    first = steps[0]
    if len(steps) == 1:
        return [first.done()]
    inputs = tuple(torch.cat(each) for each in zip(*(step.inputs for step in steps), strict=True))
    sizes = [step.inputs[0].shape[0] for step in steps]
    results = BatchedCall(first.f, inputs, first.options).done()
    return list(zip(*(each.split(sizes) for each in results), strict=True))


def at_once(f: Callable[..., Tensor]) -> Callable[..., Work]:
    """``f`` of a batch as work without steps. Also of no matrices: what comes back has the dtype that others send."""

    def work(x: Tensor, *args: Any) -> Work:
        return f(x, *args)
        yield

    return work


def answered(
    algorithm: Generator[Any, Any, Tensor], kind: type, answer: Callable[[Any], Any]
) -> Generator[Any, Any, Tensor]:
    """``algorithm`` whose yields of this ``kind`` are answered here, and all others passed on."""
    try:
        request = next(algorithm)
        while True:
            request = algorithm.send(answer(request) if isinstance(request, kind) else (yield request))
    except StopIteration as stop:
        return stop.value


def finished(algorithm: Generator[Any, Any, Tensor]) -> Tensor:
    """The result of an algorithm of which nothing is left to answer."""
    try:
        request = next(algorithm)
    except StopIteration as stop:
        return stop.value
    raise AssertionError(f"{request} is left without an answer")
