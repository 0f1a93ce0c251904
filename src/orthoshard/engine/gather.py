"""Batches of matrices dealt out to owners, and brought together again.

    gather           each rank's matrices       -> all of them at every rank
    reduce_scatter   a term of each at every rank -> the finished sums of each rank's matrices

Both use torch's collectives of even pieces, which send as a ring does and hold one batch. If all ranks own the same
number of matrices, these are the pieces. Otherwise a batch is cut evenly by elements, and one more all-to-all brings
the pieces to the owners of the matrices, or from them. These functions are generators that yield the collectives they
wait for; every rank yields equally often. May import torch, `layout`, `owners`, `linalg.host_sync` and this room.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..layout import Axis
from ..linalg.host_sync import device_type
from ..owners import gather_order
from .comm import Comm, Pending, flat, in_order

Task = Generator[Pending, None, Any]


def gather_all(tensors: Sequence[Tensor], shares: Sequence[int], axes: Sequence[Axis], comm: Comm) -> Task:
    """Gather over several axes, or over none: each rank has ``shares`` matrices, in the order of `owners.rank_on`."""
    for axis, counts in gather_order(shares, axes):
        tensors = yield from gather(tensors, counts, axis, comm)
    return tensors


def gather(tensors: Sequence[Tensor], counts: Sequence[int], axis: Axis, comm: Comm) -> Task:
    """Gather parts of a batch, ``counts`` matrices at each rank of the axis, into the whole batch, for each tensor.
    Tensors of one dtype travel together."""
    whole: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        members = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        shapes = [tensors[i].shape[1:] for i in members]
        lengths = [count * sum(shape.numel() for shape in shapes) for count in counts]
        mine = in_order(tensors[members[0]]) if len(members) == 1 else flat([tensors[i] for i in members])
        even = _even(lengths)
        mine = yield from _exchanged(mine, lengths, even, axis, comm)
        out = mine.new_empty(sum(even))
        yield comm.all_gather(out, mine, axis)
        out = out[: sum(lengths)]
        if len(members) == 1:
            whole[members[0]] = out.view(sum(counts), *shapes[0])
            continue
        pieces = out.split([count * shape.numel() for count in counts for shape in shapes])
        for place, (i, shape) in enumerate(zip(members, shapes, strict=True)):
            whole[i] = torch.cat(pieces[place :: len(shapes)]).view(sum(counts), *shape)
    return tuple(whole[i] for i in range(len(tensors)))


def reduce_scatter(x: Tensor, counts: Sequence[int], axis: Axis, comm: Comm, dtype: torch.dtype) -> Task:
    """Sum x (b, ...) over the axis and return the sums of this rank's ``counts`` matrices, in ``dtype``."""
    shape, lengths = x.shape[1:], [count * x.shape[1:].numel() for count in counts]
    pieces, x, added_here = _even(lengths), in_order(x), _adds_here(x)
    if added_here and max(lengths) * axis.size <= 2 * sum(lengths):
        pieces = lengths  # an owner gets no more than two batches
    if sum(pieces) > x.numel():
        x = torch.cat([x, x.new_zeros(sum(pieces) - x.numel())])
    out = x.new_empty(pieces[axis.coordinate] * (axis.size if added_here else 1))
    if added_here:
        yield comm.all_to_all(out, x, [pieces[axis.coordinate]] * axis.size, pieces, axis)
        out = out.view(axis.size, -1).sum(0, dtype=dtype)
    else:
        yield comm.reduce_scatter(out, x, axis)
        out = out.to(dtype)
    del x
    out = yield from _exchanged(out, pieces, lengths, axis, comm)
    return out.view(counts[axis.coordinate], *shape)


def _adds_here(x: Tensor) -> bool:
    """Return whether ranks add up the terms themselves.

    They do if the backend's own reduce-scatter would round each partial sum to 16 bits, or is gloo's, which is an
    all-reduce and takes more than twice as long.
    """
    return x.element_size() < 4 or device_type(x) == "cpu"


def _even(lengths: Sequence[int]) -> list[int]:
    """Give each rank equally many elements: these lengths if they are equal, or else just enough for all of them."""
    return [-(-sum(lengths) // len(lengths))] * len(lengths)


def _exchanged(x: Tensor, old: Sequence[int], new: Sequence[int], axis: Axis, comm: Comm) -> Task:
    """Rebalance flat x, this rank's stretch of one long buffer: ranks hold ``old`` elements before and ``new``
    afterwards. What one buffer has more than the other at its end is padding."""
    if old == new:
        yield Pending(None, "")  # ranks along other axes may have more or fewer matrices, and must yield as often
        return x
    here = axis.coordinate
    send, receive = _shared(old, new, here), _shared(new, old, here)
    out = x.new_empty(new[here])
    yield comm.all_to_all(out[: sum(receive)], x[: sum(send)], receive, send, axis)
    return out


def _shared(mine: Sequence[int], theirs: Sequence[int], here: int) -> list[int]:
    """Return how much of this rank's stretch lies in each rank's, if ranks have such lengths."""
    first, last = sum(mine[:here]), sum(mine[: here + 1])
    ends = list(accumulate(theirs))
    return [max(0, min(last, end) - max(first, end - length)) for end, length in zip(ends, theirs, strict=True)]


def finish(task: Task) -> Any:
    """Run a generator to its end, waiting for each of its collectives at once, and return what it returns."""
    while True:
        try:
            next(task).wait()
        except StopIteration as stop:
            return stop.value
