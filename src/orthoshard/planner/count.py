"""The amounts of a step as the real plan has them: flops, memory and state as `budget` counts them, and what is sent
over each axis.

Of what is sent and of what is done to whole matrices there are two figures: those of the rank that asks, to the byte,
and the mean over ranks, which is that of as many matrices as are dealt out without remainder. Ranks take turns in
owning what does not divide.

Even on the mean, what has to be done to one matrix as a whole is done by one rank: a step has at least the flops of the
largest of these. May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from math import prod
from typing import Any

import torch

from orthoshard.budget import agreement_bytes, bucket_cost, step_cost
from orthoshard.cost import all_reduce_bytes, sends
from orthoshard.engine import replicas
from orthoshard.groups import group_rule
from orthoshard.layout import AVERAGE, Axis, Replicas, deal, dealt_before, passed_on
from orthoshard.parts import Part
from orthoshard.plan import Bucket, Plan, Work
from orthoshard.planner.estimate import Amounts
from orthoshard.planner.even import WRITES, touches
from orthoshard.planner.temporaries import IN_FLIGHT, temporaries
from orthoshard.rules import Rule
from orthoshard.rules.demand import Dealt, Shared
from orthoshard.rules.low_rank import LowRankRule

BYTES_OF_AGREEMENT = 8


@dataclass(frozen=True)
class Counted:
    """``here``: of the rank that asks, rank 0 of a described mesh, with the bytes that the counter in `engine.comm`
    will count. ``mean``: of all ranks. ``messages``: bytes that the rank sends in each collective of a step, as many as
    that counter's calls."""

    here: Amounts
    mean: Amounts
    messages: tuple[float, ...]


def counted(plan: Plan, groups: Sequence[dict[str, Any]], dp: int) -> Counted:
    """``dp``: replicas whose gradients are averaged outside of the optimizer, if it does not do so itself."""
    cost = step_cost(plan, groups)
    sends = [*chain(_agreement(plan), *(_sent(bucket, groups[bucket.group]) for bucket in plan.buckets))]
    sent = _by_axis(sends)
    evenly = _by_axis(chain(_agreement(plan), *(_evenly(bucket, groups[bucket.group]) for bucket in plan.buckets)))
    assert sum(sent.values()) == cost.wire + agreement_bytes(plan), "what is sent by axis is not what is sent"
    matrices = [bucket for bucket in plan.buckets if bucket.works]
    rule = groups[matrices[0].group]["rule"] if matrices else "adamw"
    touched = sum(_touched(bucket, rule) for bucket in matrices)
    gradients = sum(_bytes(bucket) for bucket in plan.buckets if not bucket.entries[0].layout.sources)
    flops = sum(bucket_cost(bucket, groups[bucket.group]).flops for bucket in matrices)
    works = [(bucket, work, group_rule(groups[bucket.group])) for bucket in matrices for work in bucket.works]
    mean = Amounts(
        products="polar" if rule == "muon" else "factors",
        flops=max(flops, max((whole for one in works for _, whole in wholes(*one)), default=0.0)),
        touched=touched,
        passes=cost.memory - touched,
        sent={name: float(size) for name, size in evenly.items()},
        synced={"dp": float(all_reduce_bytes(gradients, dp))} if dp > 1 and gradients else {},
        state=cost.state,
        temporaries=max(
            (held(bucket, work, rule, min(IN_FLIGHT, len(works))) for bucket, work, rule in works), default=0
        ),
    )
    own = flops + sum(_more_than_mean(bucket, work, rule) for bucket, work, rule in works)
    here = replace(mean, flops=own, sent={name: float(size) for name, size in sent.items()})
    return Counted(here, mean, tuple(float(size) for _, size in sends))


def _by_axis(sent: Iterable[tuple[Axis, Fraction]]) -> dict[str, Fraction]:
    total = defaultdict[str, Fraction](Fraction)
    for axis, size in sent:
        total[_name(axis.name)] += size
    return dict(total)


def _name(axis: str) -> str:
    """The axis of the mesh: the optimizer calls the group of replicas that it is given "replicas"."""
    return "dp" if axis == "replicas" else axis


def _bytes(bucket: Bucket) -> int:
    """Of the weights of a bucket on this rank."""
    return sum(prod(entry.layout.local) for entry in bucket.entries) * bucket.entries[0].dtype.itemsize


def _touched(bucket: Bucket, rule: str) -> float:
    """Bytes that the products of a bucket read and write: of the weights, at every replica; of the rest, where the
    state is."""
    writes, total = WRITES.get(rule, 0), 0.0
    for work in bucket.works:
        size = work.part.rows.here * work.part.columns.here * bucket.entries[0].dtype.itemsize
        rest = touches(rule, *work.part.matrix) - writes
        total += size * (rest * bucket.here(work) + writes * sum(bucket.shares(work)))
    return total


def _agreement(plan: Plan) -> Iterator[tuple[Axis, Fraction]]:
    """`budget.agreement_bytes`, by axis: what is known of each parameter and of the step, and once more of the step
    where there are several meshes."""
    meshes = plan.meshes()
    for axes, members in meshes:
        for numbers in (2 * len(members) + 3, *((3,) if len(meshes) > 1 else ())):
            for axis in axes:
                yield axis, all_reduce_bytes(BYTES_OF_AGREEMENT * numbers, axis.size)


def _averaged(bucket: Bucket) -> Iterator[tuple[Axis, Fraction]]:
    """Gradients that the optimizer averages over replicas, in the pieces of `engine.replicas`."""
    for axis in bucket.entries[0].layout.sources if bucket.averaged else ():
        size, item = 0, bucket.entries[0].dtype.itemsize
        for more in (prod(entry.layout.local) * item for entry in bucket.entries):
            if size and size + more > replicas.PIECE_BYTES:
                yield axis, all_reduce_bytes(size, axis.size)
                size = 0
            size += more
        if size:
            yield axis, all_reduce_bytes(size, axis.size)


def _sent(bucket: Bucket, group: dict[str, Any]) -> Iterator[tuple[Axis, Fraction]]:
    """What rank 0 sends."""
    yield from _averaged(bucket)
    rule = group_rule(group)
    for work in bucket.works:
        demand = rule.demand(work.part.matrix, bucket.entries[0].dtype)
        yield from sends(demand, work.part, bucket.here(work), work.dealt, work.replicas, bucket.shares(work))


def _evenly(bucket: Bucket, group: dict[str, Any]) -> Iterator[tuple[Axis, Fraction]]:
    """The mean over ranks: as if all matrices of a bucket were dealt out without remainder."""
    yield from _averaged(bucket)
    rule = group_rule(group)
    for work in bucket.works:
        demand = rule.demand(work.part.matrix, bucket.entries[0].dtype)
        part = work.part.typical()
        even, owners = prod(axis.size for axis in part.axes), prod(axis.size for axis in bucket.owners)
        share = Fraction(sum(bucket.shares(work)), even)
        shares = [even // owners] * owners if bucket.owners else ()
        for axis, size in sends(demand, part, even // owners, 0, work.replicas, shares):
            yield axis, size * share


def held(bucket: Bucket, work: Work, rule: Rule, under_way: int) -> float:
    """Temporaries, where all updates under way are as large as this one."""
    part, rank = work.part, rule.rank(*work.part.matrix) if isinstance(rule, LowRankRule) else 0
    piece, cutting = (part.rows.here, part.columns.here), prod(axis.size for axis in part.over("both"))
    return temporaries(rule.name, "", part.matrix, piece, rank, bucket.here(work), under_way, cutting)


def wholes(bucket: Bucket, work: Work, rule: Rule) -> Iterator[tuple[Dealt, float]]:
    """What has to be done to whole matrices, one rank each, and its flops for one: of Muon all; of Dion and DionTail
    the orthonormalization of each tall factor, two passes of 4 p r² + 2/3 r³."""
    m, n = work.part.matrix
    demand = rule.demand((m, n), torch.float32, bucket.entries[0].device.type)
    for ask in (inner for outer in demand.asks if isinstance(outer, Shared) for inner in outer.inside):
        if isinstance(ask, Dealt):
            side, r = ask.dims
            tall = m if side == "rows" else n
            yield ask, demand.shared if not isinstance(r, int) else 2 * (4.0 * tall * r**2 + 2 / 3 * r**3)


def _more_than_mean(bucket: Bucket, work: Work, rule: Rule) -> float:
    """Flops on whole matrices that this rank does beyond the mean over ranks."""
    part, count = work.part, bucket.here(work)
    sharing = part.replicas if work.replicas == "split" else ()
    total = 0.0
    for ask, flops in wholes(bucket, work, rule):
        own, dealt = count, dealt_before(work.dealt, bucket.owners)
        for axis in (*sharing, *_dealing(ask, part, work.replicas)):
            own, dealt = deal(own, axis.size, dealt)[axis.coordinate], passed_on(dealt, axis)
        even = count / prod(axis.size for axis in (*sharing, *part.over("both")))
        total += (own - even) * flops
    return total


def _dealing(ask: Dealt, part: Part, replicas: Replicas) -> Iterator[Axis]:
    """The axes along which matrices are dealt out, in their order: that of `orthoshard.cost`."""
    yield from part.over(ask.partial) if ask.partial else ()
    yield from part.sources if replicas in AVERAGE and ask.averaged else ()
    for side in part.sides(ask.over):
        yield from reversed(side.axes)
