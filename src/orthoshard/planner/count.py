"""The amounts of a step as the real plan has them: flops, memory and state as `budget` counts them, and what is sent
over each axis.

Of what is sent there are two figures. `rank_0` is what the rank at the origin of the mesh sends, to the byte: the
counter in `engine.comm` agrees. `mean` is that of as many matrices as are dealt out evenly: ranks take turns in owning
what does not divide, so rank 0 owns as much as any, and more than most. Times are of the mean.

Flops are those of all ranks alike; but what has to be done to one matrix as a whole is done by one rank, so a step
lasts at least as long as the largest of these. May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from orthoshard.budget import agreement_bytes, bucket_cost, step_cost
from orthoshard.cost import all_reduce_bytes, sends
from orthoshard.groups import group_rule
from orthoshard.layout import Axis
from orthoshard.plan import Bucket, Plan
from orthoshard.planner.estimate import Amounts
from orthoshard.planner.even import TOUCHES
from orthoshard.planner.temporaries import IN_FLIGHT, temporaries
from orthoshard.rules import Rule
from orthoshard.rules.low_rank import LowRankRule

BYTES_OF_AGREEMENT = 8


@dataclass(frozen=True)
class Counted:
    """``amounts``, with the mean of what is sent; ``rank_0``: what rank 0 sends, by axis; its sum is what `budget` says
    of a step."""

    amounts: Amounts
    rank_0: dict[str, Fraction]


def counted(plan: Plan, groups: Sequence[dict[str, Any]], dp: int) -> Counted:
    """``dp``: replicas whose gradients are averaged outside of the optimizer, if it does not do so itself."""
    cost = step_cost(plan, groups)
    mean, rank_0 = defaultdict[str, Fraction](Fraction), defaultdict[str, Fraction](Fraction)
    for axis, size in _agreement(plan):
        mean[axis.name] += size
        rank_0[axis.name] += size
    touched, gradients, whole, held, rule = 0.0, 0, 0.0, 0.0, "adamw"
    under_way = min(IN_FLIGHT, sum(bool(bucket.works) for bucket in plan.buckets))
    for bucket in plan.buckets:
        group = groups[bucket.group]
        for axis, size in _sent(bucket, group):
            rank_0[axis.name] += size
        for axis, size in _sent_evenly(bucket, group):
            mean[axis.name] += size
        gradients += 0 if bucket.entries[0].layout.sources else _bytes(bucket)
        if bucket.works:
            rule = group["rule"]
            touched += TOUCHES.get(rule, 0) * _bytes(bucket)
            whole = max(whole, _largest(bucket, group_rule(group)))
            held = max(held, _held(bucket, group_rule(group), under_way))
    assert sum(rank_0.values()) == cost.wire + agreement_bytes(plan), "what is sent by axis is not what is sent"
    matrices = [bucket_cost(bucket, groups[bucket.group]) for bucket in plan.buckets if bucket.works]
    amounts = Amounts(
        products="polar" if rule == "muon" else "factors",
        flops=max(sum(one.flops for one in matrices), whole),
        touched=touched,
        passes=cost.memory - touched,
        sent={_name(axis): float(size) for axis, size in mean.items()},
        synced={"dp": float(all_reduce_bytes(gradients, dp))} if dp > 1 and gradients else {},
        state=cost.state,
        temporaries=held,
    )
    return Counted(amounts, {_name(axis): size for axis, size in rank_0.items()})


def _name(axis: str) -> str:
    """The axis of the mesh: the optimizer calls the group of replicas that it is given "replicas"."""
    return "dp" if axis == "replicas" else axis


def _bytes(bucket: Bucket) -> int:
    """Of the weights of a bucket on this rank."""
    return sum(prod(entry.layout.local) for entry in bucket.entries) * bucket.entries[0].dtype.itemsize


def _agreement(plan: Plan) -> Iterator[tuple[Axis, Fraction]]:
    """`budget.agreement_bytes`, by axis."""
    meshes = plan.meshes()
    for axes, members in meshes:
        numbers = 2 * len(members) + 3 * (1 + (len(meshes) > 1))
        for axis in axes:
            yield axis, all_reduce_bytes(BYTES_OF_AGREEMENT * numbers, axis.size)


def _averaged(bucket: Bucket) -> Iterator[tuple[Axis, Fraction]]:
    """Gradients that the optimizer averages over replicas."""
    for axis in bucket.entries[0].layout.sources if bucket.averaged else ():
        yield axis, all_reduce_bytes(_bytes(bucket), axis.size)


def _sent(bucket: Bucket, group: dict[str, Any]) -> Iterator[tuple[Axis, Fraction]]:
    """What rank 0 sends."""
    yield from _averaged(bucket)
    rule = group_rule(group)
    for work in bucket.works:
        demand = rule.demand(work.part.matrix, bucket.entries[0].dtype)
        yield from sends(demand, work.part, bucket.here(work), work.dealt, work.replicas, bucket.shares(work))


def _sent_evenly(bucket: Bucket, group: dict[str, Any]) -> Iterator[tuple[Axis, Fraction]]:
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


def _held(bucket: Bucket, rule: Rule, under_way: int) -> float:
    """Temporaries, if all buckets under way were as this one."""
    total = 0.0
    for work in bucket.works:
        part, rank = work.part, rule.rank(*work.part.matrix) if isinstance(rule, LowRankRule) else 0
        piece, cutting = (part.rows.here, part.columns.here), prod(axis.size for axis in part.over("both"))
        total += temporaries(rule.name, "", part.matrix, piece, rank, bucket.here(work), under_way, cutting)
    return total


def _largest(bucket: Bucket, rule: Rule) -> float:
    """Flops of the largest matrix that one rank treats as a whole."""
    sizes = [work.part.matrix for work in bucket.works]
    return max(whole_flops(rule, m, n, bucket) for m, n in sizes)


def whole_flops(rule: Rule, m: int, n: int, bucket: Bucket) -> float:
    """Flops on the whole matrix, which one rank does: of Muon all; of Dion and DionTail orthonormalization, which is
    what `shared` has beside two products of 2 m n r."""
    shared = rule.demand((m, n), bucket.entries[0].dtype).shared
    return shared - 4.0 * m * n * rule.rank(m, n) if isinstance(rule, LowRankRule) else shared
