"""What a step costs this rank: flops, memory traffic, bytes on the wire, state. Pure; nothing is run or sent.

    all-reduce of B bytes over a ranks          2 B (a - 1) / a     a ring (Patarasuk & Yuan, 2009, section 3)
    to owners and back, x cut over a ranks      what is not this rank's own, each way
    reduce-scatter and all-gather by matrices   (b - own) and own (a - 1) matrices
    results shared over a replicas              own (a - 1) matrices' results

b matrices, ``own`` of them dealt to this rank. The counter in `engine.comm` must agree to the byte.
May import `rules`, `groups`, `layout` and `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from .groups import group_rule
from .layout import Layout, deal, pieces, stretch
from .plan import Bucket, Plan
from .rules.demand import Dealt, Length, Shared, Summed


@dataclass(frozen=True)
class Cost:
    """Of one step on this rank.

    flops   multiplications and additions
    memory  bytes read and written by the passes over whole matrices and vectors
    wire    bytes this rank sends for the updates
    state   bytes of optimizer state kept here
    """

    flops: float = 0.0
    memory: float = 0.0
    wire: Fraction = Fraction(0)
    state: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.memory + other.memory,
            self.wire + other.wire,
            self.state + other.state,
        )


def step_cost(plan: Plan, groups: Sequence[dict[str, Any]]) -> Cost:
    """The cost of a step in which every parameter has a gradient, without the agreement on gradients."""
    return sum((bucket_cost(bucket, groups[bucket.group]) for bucket in plan.buckets), Cost())


def agreement_bytes(plan: Plan) -> Fraction:
    """Bytes sent to agree on the gradients of a step: 16 for each parameter of a mesh and 24 for the step, over each
    axis; and 24 more where parameters are on several meshes."""
    total = Fraction(0)
    meshes = plan.meshes()
    for axes, members in meshes:
        numbers = 2 * len(members) + 3 * (1 + (len(meshes) > 1))
        total += sum((all_reduce_bytes(8 * numbers, axis.size) for axis in axes), Fraction(0))
    return total


def comparison_bytes(plan: Plan) -> Fraction:
    """Bytes sent once, to compare plans: 16 for their length and 16 for each parameter of a mesh, over each axis."""
    return sum(
        (
            all_reduce_bytes(size, axis.size)
            for axes, members in plan.meshes()
            for axis in axes
            for size in (16, 16 * len(members))
        ),
        Fraction(0),
    )


def bucket_cost(bucket: Bucket, group: dict[str, Any]) -> Cost:
    """The cost of one bucket's update on this rank."""
    rule, first = group_rule(group), bucket.entries[0]
    state = sum(
        prod(entry.state_layout(slot).local) * slot.dtype.itemsize
        for entry in bucket.entries
        for _, slot in entry.slots
    )
    here = sum(prod(entry.layout.local) for entry in bucket.entries)
    demand = rule.demand(bucket.shape, first.dtype)
    memory = demand.accesses * here * first.dtype.itemsize
    if not bucket.shape:
        return Cost(demand.divisible * here, memory, Fraction(0), state)
    count = sum(entry.layout.batch for entry in bucket.entries)
    layout = first.layout
    cutting = prod(axis.size for axis in layout.over("both"))
    replicas = prod(axis.size for axis in layout.replicas)
    flops = count * (demand.divisible + demand.shared / replicas) / cutting
    wire = (
        sum((_ask_bytes(ask, layout, count, bucket.dealt) for ask in demand.asks), Fraction(0))
        if count
        else Fraction(0)
    )
    return Cost(flops, memory, wire, state)


def all_reduce_bytes(size: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1) * size, ranks)


def _ask_bytes(ask: Summed | Dealt | Shared, layout: Layout, count: int, dealt: int) -> Fraction:
    if isinstance(ask, Summed):
        size = count * _entries(ask.dims, layout) * ask.dtype.itemsize
        return sum((all_reduce_bytes(size, axis.size) for axis in layout.over(ask.over)), Fraction(0))
    if isinstance(ask, Dealt):
        return _dealt_bytes(ask, layout, count, dealt)
    return _shared_bytes(ask, layout, count, dealt)


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


def _shared_bytes(ask: Shared, layout: Layout, count: int, dealt: int) -> Fraction:
    back = 0
    result = sum(_entries(dims, layout) * dtype.itemsize for dims, dtype in ask.results)
    for axis in layout.replicas:
        count = deal(count, axis.size, dealt)[axis.coordinate]
        back += count * (axis.size - 1) * result
    return back + sum((_ask_bytes(inner, layout, count, dealt) for inner in ask.inside), Fraction(0))
