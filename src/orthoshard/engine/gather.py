"""Parts of a batch, one at each rank, to the whole batch at every rank.

All-to-alls, because ranks may have different numbers of matrices. Generators, which yield the collectives that they
wait for; every rank yields as often. May import torch, `layout` and this room.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Axis, lines
from .comm import Comm, Pending, flat

Task = Generator[Pending, None, Any]


def gather_all(tensors: Sequence[Tensor], shares: Sequence[int], axes: Sequence[Axis], comm: Comm) -> Task:
    """Over several axes: ``shares`` matrices at each rank, by `layout.place`, in this order. As it is, over none."""
    for axis, counts in lines(shares, axes):
        tensors = yield from gather(tensors, counts, axis, comm)
    return tensors


def gather(tensors: Sequence[Tensor], counts: Sequence[int], axis: Axis, comm: Comm) -> Task:
    """Parts of a batch, ``counts`` matrices at each rank of the axis -> the whole batch, for each tensor.
    Tensors of one dtype travel together."""
    whole: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        members = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        shapes = [tensors[i].shape[1:] for i in members]
        each, own = sum(shape.numel() for shape in shapes), counts[axis.coordinate]
        mine = flat([tensors[i] for i in members])
        out = mine.new_empty(sum(counts) * each)
        receive = [count * each for count in counts]
        yield comm.all_to_all(out, mine.repeat(axis.size), receive, [own * each] * axis.size, axis)
        chunks = [
            chunk.split([count * shape.numel() for shape in shapes])
            for chunk, count in zip(out.split(receive), counts, strict=True)
        ]
        for place, (i, shape) in enumerate(zip(members, shapes, strict=True)):
            parts = [chunk[place].view(count, *shape) for chunk, count in zip(chunks, counts, strict=True)]
            whole[i] = torch.cat(parts)
    return tuple(whole[i] for i in range(len(tensors)))


def finish(task: Task) -> Any:
    """What a generator returns, each of its collectives waited for at once."""
    while True:
        try:
            next(task).wait()
        except StopIteration as stop:
            return stop.value
