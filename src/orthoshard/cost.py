"""What one update of a batch costs one rank, by its rule and how its matrices are cut. Pure; nothing is run or sent.

    all-reduce of B bytes over a ranks          2 B (a - 1) / a     a ring (Patarasuk & Yuan, 2009, section 3)
    to owners and back, x cut over a ranks      what is not this rank's own, each way
    reduce-scatter and all-gather by matrices   (b - own) and own (a - 1) matrices
    results shared over a replicas              own (a - 1) matrices' results

b matrices, ``own`` of them dealt to this rank. The counter in `engine.comm` must agree to the byte.

Where replicas hold the same batch, `worth_sharing` decides whether each does its share and sends the results, or all
do everything: by flops and bytes at the rates of the device.
May import `rules`, `layout` and `parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

from .layout import deal
from .parts import Part
from .rules.demand import Dealt, Demand, Length, Shared, Summed

# Flops that a rank does in the time in which it sends a byte; only the order of magnitude matters.
# cpu: 100 GFLOP/s a process and 0.7 GB/s of gloo (measured: benchmarks/results/gpt2-small-2-processes.json).
# Others: half of an H100's 494 TFLOP/s in TF32, over one 400 Gb/s port a GPU (NVIDIA DGX H100 datasheet, 2023).
FLOPS_PER_BYTE = {"cpu": 150.0}
FLOPS_PER_BYTE_ELSEWHERE = 5000.0


def update_cost(demand: Demand, part: Part, count: int, dealt: int, share: bool) -> tuple[float, Fraction]:
    """Flops, and bytes that this rank sends, of one update of ``count`` matrices."""
    if not count:
        return 0.0, Fraction(0)
    cutting = prod(axis.size for axis in part.over("both"))
    replicas = prod(axis.size for axis in part.replicas) if share else 1
    flops = count * (demand.divisible + demand.shared / replicas)
    wire = sum((_ask_bytes(ask, part, count, dealt, share) for ask in demand.asks), Fraction(0))
    return flops / cutting, wire


def worth_sharing(demand: Demand, part: Part, device: str) -> bool:
    """Whether the replicas of a batch had better share out its work than each do all of it.

    Asked of the rank at the origin of the mesh, and of as many matrices as are dealt out evenly, so that every rank
    answers alike.
    """
    if not part.replicas:
        return False
    part, even = part.typical(), prod(axis.size for axis in part.axes)
    rate = FLOPS_PER_BYTE.get(device, FLOPS_PER_BYTE_ELSEWHERE)

    def time(share: bool) -> float:
        flops, wire = update_cost(demand, part, even, 0, share)
        return flops + rate * float(wire)

    return time(True) <= time(False)


def routes(demand: Demand, part: Part, share: bool) -> list[str]:
    """In words, how one update is answered on this layout."""
    return list(dict.fromkeys(word for ask in demand.asks for word in _routes(ask, part, share)))


def _routes(ask: Summed | Dealt | Shared, part: Part, share: bool) -> list[str]:
    if isinstance(ask, Summed):
        return [f"all-reduce over {axis}" for axis in part.over(ask.over)]
    if isinstance(ask, Dealt):
        partial = part.over(ask.partial) if ask.partial else ()
        return [
            *(f"reduce-scatter, work, all-gather over {axis}" for axis in partial),
            *(f"to owners, work, and back over {axis}" for axis in part.over(ask.over)),
        ]
    inside = [word for inner in ask.inside for word in _routes(inner, part, share)]
    return [*inside, *(f"{'shared out over' if share else 'repeated at'} {axis}" for axis in part.replicas)]


def all_reduce_bytes(size: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1) * size, ranks)


def _ask_bytes(ask: Summed | Dealt | Shared, part: Part, count: int, dealt: int, share: bool) -> Fraction:
    if isinstance(ask, Summed):
        size = count * _entries(ask.dims, part) * ask.dtype.itemsize
        return sum((all_reduce_bytes(size, axis.size) for axis in part.over(ask.over)), Fraction(0))
    if isinstance(ask, Dealt):
        return _dealt_bytes(ask, part, count, dealt)
    return _shared_bytes(ask, part, count, dealt, share)


def _dealt_bytes(ask: Dealt, part: Part, count: int, dealt: int) -> Fraction:
    lengths = [_length(dim, part) for dim in ask.dims]
    item, total = ask.dtype.itemsize, 0
    for axis in part.over(ask.partial) if ask.partial else ():
        own = deal(count, axis.size, dealt)[axis.coordinate]
        total += (count - own + own * (axis.size - 1)) * prod(lengths) * item
        count = own
    for dim, side in enumerate(part.sides(ask.over)):
        for i in reversed(range(len(side.axes))):
            parts = side.pieces(i)
            here, outer, other = parts[side.axes[i].coordinate], sum(parts), lengths[1 - dim]
            own = deal(count, side.axes[i].size, dealt)[side.axes[i].coordinate]
            total += ((count - own) * here + own * (outer - here)) * other * item
            count, lengths[dim] = own, outer
    return Fraction(total)


def _length(dim: Length, part: Part) -> int:
    """How long a dimension is on this rank."""
    return dim if isinstance(dim, int) else part.side(dim).here


def _entries(dims: Sequence[Length], part: Part) -> int:
    return prod(_length(dim, part) for dim in dims)


def _shared_bytes(ask: Shared, part: Part, count: int, dealt: int, share: bool) -> Fraction:
    back = 0
    result = sum(_entries(dims, part) * dtype.itemsize for dims, dtype in ask.results)
    for axis in part.replicas if share else ():
        count = deal(count, axis.size, dealt)[axis.coordinate]
        back += count * (axis.size - 1) * result
    return back + sum((_ask_bytes(inner, part, count, dealt, share) for inner in ask.inside), Fraction(0))
