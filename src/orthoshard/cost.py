"""What one update of a batch costs one rank, by its rule and how its matrices are cut. Pure; nothing is run or sent.

    all-reduce of B bytes over a ranks          2 B (a - 1) / a     a ring (Patarasuk & Yuan, 2009, section 3)
    to owners and back, x cut over a ranks      what is not this rank's own, each way
    reduce-scatter and all-gather by matrices   (b - own) and own (a - 1) matrices
    results shared over a replicas              own (a - 1) matrices' results
    published by the owners of state            alike, of what the weights take

b matrices, ``own`` of them dealt to this rank. The counter in `engine.comm` must agree to the byte.

Where replicas hold the same batch, `at_replicas` decides whether each does its share and sends the results, or all do
everything, by flops and bytes at the rates of the device; where their gradients are their own, `worth_averaging`
whether they exchange factors or gradients, by bytes.
May import `rules`, `layout` and `parts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import prod

import torch

from .layout import AVERAGE, Axis, Replicas, deal, dealt_before, lines, passed_on
from .parts import Part
from .rules.demand import Dealt, Demand, Length, Shared, Summed

# What is sent over which axis, an item for each collective: their number is that of the engine's counter, too.
Sends = Iterator[tuple[Axis, Fraction]]

# The dimensions of one matrix's results, and their dtypes.
Results = Sequence[tuple[tuple[Length, ...], torch.dtype]]

# Flops that a rank does in the time in which it sends a byte; only the order of magnitude matters.
# cpu: 100 GFLOP/s a process and 0.7 GB/s of gloo (measured: benchmarks/results/gpt2-small-2-processes.json).
# Others: half of an H100's 494 TFLOP/s in TF32, over one 400 Gb/s port a GPU (NVIDIA DGX H100 datasheet, 2023).
FLOPS_PER_BYTE = {"cpu": 150.0}
FLOPS_PER_BYTE_ELSEWHERE = 5000.0


def update_cost(
    demand: Demand, part: Part, count: int, dealt: int, replicas: Replicas, shares: Sequence[int] = ()
) -> tuple[float, Fraction]:
    """Flops, and bytes that this rank sends, of one update of ``count`` matrices. Where each replica keeps the state of
    its own alone, ``shares`` are the matrices of every replica, and ``count`` this one's."""
    cutting = prod(axis.size for axis in part.over("both"))
    sharing = prod(axis.size for axis in part.replicas) if replicas == "split" else 1
    written = sum(shares or (count,))
    flops = count * (demand.divisible - demand.applied + demand.shared / sharing) + written * demand.applied
    sent = sends(demand, part, count, dealt, replicas, shares)
    return flops / cutting, sum((size for _, size in sent), Fraction(0))


def sends(demand: Demand, part: Part, count: int, dealt: int, replicas: Replicas, shares: Sequence[int] = ()) -> Sends:
    """Bytes that this rank sends in each collective of one update of ``count`` matrices; ``shares`` as in
    `update_cost`. A rank without matrices takes part in those that are not sums, and sends nothing."""
    first = dealt_before(dealt, part.replicas if replicas == "own" else ())
    for ask in demand.asks:
        yield from _ask_sends(ask, part, count, first, replicas)
    for axis, counts in lines(shares, part.replicas if replicas == "own" else ()):
        yield from _gathered(demand.published, part, counts[axis.coordinate], axis)


def at_replicas(demand: Demand, part: Part, device: str) -> Replicas:
    """Whether the replicas of a batch with equal gradients had better share out its work, or repeat it."""
    return min(("split", "repeat"), key=lambda way: _time(demand, part, device, way))


def worth_averaging(demand: Demand, part: Part, gradient: torch.dtype) -> bool:
    """Whether replicas with gradients of their own send less by exchanging factors than gradients of this dtype, which
    is where (m + n) r < m n. By bytes alone: who trains in this way has slow links between replicas."""
    factors, _ = _average(demand, part, "average")
    rest, even = _average(demand, part, "repeat")
    typical = part.typical()
    size = typical.rows.here * typical.columns.here * gradient.itemsize * even
    return factors < rest + sum((all_reduce_bytes(size, axis.size) for axis in part.sources), Fraction(0))


def _time(demand: Demand, part: Part, device: str, replicas: Replicas) -> float:
    """In flops."""
    wire, even = _average(demand, part, replicas)
    flops, _ = update_cost(demand, part.typical(), even, 0, replicas)
    return flops + FLOPS_PER_BYTE.get(device, FLOPS_PER_BYTE_ELSEWHERE) * float(wire)


def _average(demand: Demand, part: Part, replicas: Replicas) -> tuple[Fraction, int]:
    """Bytes sent for as many matrices as are dealt out evenly, by the rank at the origin of the mesh; and their number.
    Every rank can ask this, and gets the same answer."""
    even = prod(axis.size for axis in part.axes)
    return update_cost(demand, part.typical(), even, 0, replicas)[1], even


def routes(demand: Demand, part: Part, replicas: Replicas) -> list[str]:
    """In words, how one update is answered on this layout."""
    words = [word for ask in demand.asks for word in _routes(ask, part, replicas)]
    words += [f"published by owners over {axis}" for axis in part.replicas if replicas == "own"]
    return list(dict.fromkeys(words))


def _routes(ask: Summed | Dealt | Shared, part: Part, replicas: Replicas) -> list[str]:
    if isinstance(ask, Summed):
        return [f"all-reduce over {axis}" for axis in (*part.over(ask.over), *_averaging(ask, part, replicas))]
    if isinstance(ask, Dealt):
        partial = (*(part.over(ask.partial) if ask.partial else ()), *_averaging(ask, part, replicas))
        return [
            *(f"reduce-scatter, work, all-gather over {axis}" for axis in partial),
            *(f"to owners, work, and back over {axis}" for axis in part.over(ask.over)),
        ]
    words = {
        "split": "shared out over",
        "repeat": "repeated at",
        "average": "factors averaged over",
        "average_bfloat16": "factors averaged in bfloat16 over",
    }
    inside = [word for inner in ask.inside for word in _routes(inner, part, replicas)]
    return [*inside, *(f"{words[replicas]} {axis}" for axis in part.replicas if replicas in words)]


def _averaging(ask: Summed | Dealt, part: Part, replicas: Replicas) -> tuple[Axis, ...]:
    """The replicas over which an answer is averaged."""
    return part.sources if replicas in AVERAGE and ask.averaged else ()


def all_reduce_bytes(size: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1) * size, ranks)


def _ask_sends(ask: Summed | Dealt | Shared, part: Part, count: int, dealt: int, replicas: Replicas) -> Sends:
    if isinstance(ask, Dealt):
        yield from _dealt_sends(ask, part, count, dealt, replicas)
    elif isinstance(ask, Shared):
        yield from _shared_sends(ask, part, count, dealt, replicas)
    else:
        each, item, wire = _entries(ask.dims, part), ask.dtype.itemsize, AVERAGE.get(replicas)
        summed = count * each * item  # nothing: no sum is started
        for axis in part.over(ask.over) if summed else ():
            yield axis, all_reduce_bytes(summed, axis.size)
        for axis in _averaging(ask, part, replicas):
            if wire is not None and ask.over != "both":
                yield from _by_matrices(count, axis, dealt, each * wire.itemsize)
            elif summed:
                yield axis, all_reduce_bytes(summed, axis.size)


def _dealt_sends(ask: Dealt, part: Part, count: int, dealt: int, replicas: Replicas) -> Sends:
    lengths = [_length(dim, part) for dim in ask.dims]
    item = ask.dtype.itemsize
    for axis in part.over(ask.partial) if ask.partial else ():
        yield from _by_matrices(count, axis, dealt, prod(lengths) * item)
        count, dealt = deal(count, axis.size, dealt)[axis.coordinate], passed_on(dealt, axis)
    for axis in _averaging(ask, part, replicas):
        narrow = (AVERAGE.get(replicas) or ask.dtype).itemsize
        yield from _by_matrices(count, axis, dealt, prod(lengths) * narrow)
        count, dealt = deal(count, axis.size, dealt)[axis.coordinate], passed_on(dealt, axis)
    for dim, side in enumerate(part.sides(ask.over)):
        for i in reversed(range(len(side.axes))):
            parts = side.pieces(i)
            here, outer, other = parts[side.axes[i].coordinate], sum(parts), lengths[1 - dim]
            own = deal(count, side.axes[i].size, dealt)[side.axes[i].coordinate]
            yield side.axes[i], Fraction((count - own) * here * other * item)
            yield side.axes[i], Fraction(own * (outer - here) * other * item)
            count, lengths[dim], dealt = own, outer, passed_on(dealt, side.axes[i])


def _by_matrices(count: int, axis: Axis, dealt: int, size: int) -> Sends:
    """A reduce-scatter and an all-gather of matrices of so many bytes."""
    own = deal(count, axis.size, dealt)[axis.coordinate]
    yield axis, Fraction((count - own) * size)
    yield axis, Fraction(own * (axis.size - 1) * size)


def _length(dim: Length, part: Part) -> int:
    """How long a dimension is on this rank."""
    return dim if isinstance(dim, int) else part.side(dim).here


def _entries(dims: Sequence[Length], part: Part) -> int:
    return prod(_length(dim, part) for dim in dims)


def _shared_sends(ask: Shared, part: Part, count: int, dealt: int, replicas: Replicas) -> Sends:
    back: list[tuple[Axis, int]] = []
    for axis in part.replicas if replicas == "split" else ():
        count, dealt = deal(count, axis.size, dealt)[axis.coordinate], passed_on(dealt, axis)
        back.append((axis, count))
    for inner in ask.inside:
        yield from _ask_sends(inner, part, count, dealt, replicas)
    for axis, own in back:
        yield from _gathered(ask.results, part, own, axis)


def _gathered(results: Results, part: Part, own: int, axis: Axis) -> Sends:
    """Results of ``own`` matrices for all others on the axis; those of one dtype travel together."""
    for dtype in dict.fromkeys(dtype for _, dtype in results):
        size = sum(_entries(dims, part) for dims, of in results if of == dtype) * dtype.itemsize
        yield axis, Fraction(own * (axis.size - 1) * size)
