"""What one update of a batch costs one rank, by its rule and its layout. Pure; nothing is run or sent.

    all-reduce of B bytes over a ranks          2 B (a - 1) / a     a ring (Patarasuk & Yuan, 2009, section 3)
    to owners and back, x cut over a ranks      what is not this rank's own, each way
    reduce-scatter and all-gather by matrices   (b - own) and own (a - 1) matrices
    results shared over a replicas              own (a - 1) matrices' results

b matrices, ``own`` of them dealt to this rank. The counter in `engine.comm` must agree to the byte.

Where replicas hold the same batch, `worth_sharing` decides whether each does its share and sends the results, or all
do everything: by flops and bytes at the rates of the device.
May import `rules` and `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod

from .layout import Layout, deal, pieces, stretch
from .rules.demand import Dealt, Demand, Length, Shared, Summed

# Flops that a rank does in the time in which it sends a byte; only the order of magnitude matters.
# cpu: 100 GFLOP/s a process and 0.7 GB/s of gloo (measured: benchmarks/results/gpt2-small-2-processes.json).
# Others: half of an H100's 494 TFLOP/s in TF32, over one 400 Gb/s port a GPU (NVIDIA DGX H100 datasheet, 2023).
FLOPS_PER_BYTE = {"cpu": 150.0}
FLOPS_PER_BYTE_ELSEWHERE = 5000.0


def update_cost(demand: Demand, layout: Layout, count: int, dealt: int, share: bool) -> tuple[float, Fraction]:
    """Flops, and bytes that this rank sends, of one update of ``count`` matrices."""
    if not count:
        return 0.0, Fraction(0)
    cutting = prod(axis.size for axis in layout.over("both"))
    replicas = prod(axis.size for axis in layout.replicas) if share else 1
    flops = count * (demand.divisible + demand.shared / replicas)
    wire = sum((_ask_bytes(ask, layout, count, dealt, share) for ask in demand.asks), Fraction(0))
    return flops / cutting, wire


def worth_sharing(demand: Demand, layout: Layout, device: str) -> bool:
    """Whether the replicas of a batch had better share out its work than each do all of it.

    Asked of the rank at the origin of the mesh, and of as many matrices as are dealt out evenly, so that every rank
    answers alike.
    """
    if not layout.replicas:
        return False
    layout, even = layout.at_origin(), prod(axis.size for axis in layout.axes)
    rate = FLOPS_PER_BYTE.get(device, FLOPS_PER_BYTE_ELSEWHERE)

    def time(share: bool) -> float:
        flops, wire = update_cost(demand, layout, even, 0, share)
        return flops + rate * float(wire)

    return time(True) <= time(False)


def routes(demand: Demand, layout: Layout, share: bool) -> list[str]:
    """In words, how one update is answered on this layout."""
    return list(dict.fromkeys(word for ask in demand.asks for word in _routes(ask, layout, share)))


def _routes(ask: Summed | Dealt | Shared, layout: Layout, share: bool) -> list[str]:
    if isinstance(ask, Summed):
        return [f"all-reduce over {axis}" for axis in layout.over(ask.over)]
    if isinstance(ask, Dealt):
        partial = layout.over(ask.partial) if ask.partial else ()
        return [
            *(f"reduce-scatter, work, all-gather over {axis}" for axis in partial),
            *(f"to owners, work, and back over {axis}" for axis in layout.over(ask.over)),
        ]
    inside = [word for inner in ask.inside for word in _routes(inner, layout, share)]
    return [*inside, *(f"{'shared out over' if share else 'repeated at'} {axis}" for axis in layout.replicas)]


def all_reduce_bytes(size: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1) * size, ranks)


def _ask_bytes(ask: Summed | Dealt | Shared, layout: Layout, count: int, dealt: int, share: bool) -> Fraction:
    if isinstance(ask, Summed):
        size = count * _entries(ask.dims, layout) * ask.dtype.itemsize
        return sum((all_reduce_bytes(size, axis.size) for axis in layout.over(ask.over)), Fraction(0))
    if isinstance(ask, Dealt):
        return _dealt_bytes(ask, layout, count, dealt)
    return _shared_bytes(ask, layout, count, dealt, share)


def _dealt_bytes(ask: Dealt, layout: Layout, count: int, dealt: int) -> Fraction:
    lengths = [_length(dim, layout) for dim in ask.dims]
    item, total = ask.dtype.itemsize, 0
    for axis in layout.over(ask.partial) if ask.partial else ():
        own = deal(count, axis.size, dealt)[axis.coordinate]
        total += (count - own + own * (axis.size - 1)) * prod(lengths) * item
        count = own
    m, n = layout.matrix
    rows, columns = layout.over("rows"), layout.over("columns")
    followed = {"rows": [(0, m, rows)], "columns": [(0, n, columns)], "both": [(0, m, rows), (1, n, columns)]}
    for dim, whole, axes in followed[ask.over]:
        for i in reversed(range(len(axes))):
            outer = stretch(whole, axes[:i])[1]
            parts = pieces(outer, axes[i].size)
            here, other = parts[axes[i].coordinate], lengths[1 - dim]
            own = deal(count, axes[i].size, dealt)[axes[i].coordinate]
            total += ((count - own) * here + own * (outer - here)) * other * item
            count, lengths[dim] = own, outer
    return Fraction(total)


def _length(dim: Length, layout: Layout) -> int:
    """How long a dimension is on this rank."""
    return dim if isinstance(dim, int) else layout.local[-2 if dim == "rows" else -1]


def _entries(dims: Sequence[Length], layout: Layout) -> int:
    return prod(_length(dim, layout) for dim in dims)


def _shared_bytes(ask: Shared, layout: Layout, count: int, dealt: int, share: bool) -> Fraction:
    back = 0
    result = sum(_entries(dims, layout) * dtype.itemsize for dims, dtype in ask.results)
    for axis in layout.replicas if share else ():
        count = deal(count, axis.size, dealt)[axis.coordinate]
        back += count * (axis.size - 1) * result
    return back + sum((_ask_bytes(inner, layout, count, dealt, share) for inner in ask.inside), Fraction(0))
