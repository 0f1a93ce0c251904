"""The amounts of a step of a real plan, from a dry run (`engine.dryrun`), and the bytes sent over each axis.

Bytes sent and work on whole matrices have two figures: that of this rank, to the byte, and the mean over ranks, which
is that of a number of matrices that divides evenly. Ranks take turns in owning the remainder. May import torch and
``orthoshard``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from math import prod
from typing import Any

from orthoshard.budget import agreement, averaging, step_cost, update_dry
from orthoshard.cost import Alike, all_reduce_bytes
from orthoshard.elementwise import ElementwiseRule
from orthoshard.engine.dryrun import Dry, dry_entries
from orthoshard.engine.run import most_in_flight
from orthoshard.groups import group_rule
from orthoshard.lab.plan.estimate import Amounts
from orthoshard.layout import Axis
from orthoshard.plan import Bucket, BucketUpdate, Plan
from orthoshard.rules import MatrixRule


@dataclass(frozen=True)
class Counted:
    """The amounts of a step.

    Args:
        here: on this rank, rank 0 of a described mesh, with the bytes that the counter in `engine.comm` will count.
        mean: the mean over ranks.
        messages: bytes that this rank sends in each collective of a step; that counter counts as many calls.
    """

    here: Amounts
    mean: Amounts
    messages: tuple[float, ...]


def counted(plan: Plan, groups: Sequence[dict[str, Any]], dp: int) -> Counted:
    """Return the amounts of a step of ``plan``.

    ``dp`` is the number of replicas, whose gradients are averaged outside of the optimizer unless it does that itself.
    """
    cost = step_cost(plan, groups)
    rules = [group_rule(group) for group in groups]
    works = [
        (bucket, work, rule)
        for bucket in plan.buckets
        for work in bucket.updates
        if isinstance(rule := rules[bucket.group], MatrixRule)
    ]
    here = [update_dry(*one) for one in works]
    sent = [*agreement(plan), *chain.from_iterable(map(averaging, plan.buckets))]
    sends = [*sent, *((each.axis, each.bytes) for dry in here for each in dry.sent)]
    evenly, flops = [*sent], 0.0
    for bucket, work, rule in works:
        dry, share = _mean(bucket, work, rule)
        evenly += [(each.axis, each.bytes * share) for each in dry.sent]
        flops += dry.total_flops * float(share)
    entries = [
        dry_entries(rule, bucket.entries[0].dtype, sum(prod(entry.layout.local) for entry in bucket.entries)).peak
        for bucket in plan.buckets
        if isinstance(rule := rules[bucket.group], ElementwiseRule)
    ]
    gradients = sum(_bytes(bucket) for bucket in plan.buckets if not bucket.entries[0].layout.unreduced_axes)
    touched = sum(dry.touched for dry in here)
    mean = Amounts(
        products="polar" if any(rule.direction.full for _, _, rule in works) else "factors",
        flops=flops,
        touched=touched,
        passes=cost.memory - touched,
        sent={name: float(size) for name, size in _by_axis(evenly).items()},
        synced={"dp": float(all_reduce_bytes(gradients, dp))} if dp > 1 and gradients else {},
        state=cost.state,
        temporaries=most_in_flight((_held(*one), one[1].peak) for one in works) + max(entries, default=0),
    )
    own = replace(mean, flops=cost.flops, sent={name: float(size) for name, size in _by_axis(sends).items()})
    return Counted(own, mean, tuple(float(size) for _, size in sends))


def _by_axis(sent: Iterable[tuple[Axis, Fraction]]) -> dict[str, Fraction]:
    total = defaultdict[str, Fraction](Fraction)
    for axis, size in sent:
        total[_name(axis.name)] += size
    return dict(total)


def _name(axis: str) -> str:
    """Return the name of the mesh axis. The optimizer calls the group of replicas that it is given "replicas"."""
    return "dp" if axis == "replicas" else axis


def _bytes(bucket: Bucket) -> int:
    """Return the bytes of the weights of a bucket on this rank."""
    return sum(prod(entry.layout.local) for entry in bucket.entries) * bucket.entries[0].dtype.itemsize


def _mean(bucket: Bucket, work: BucketUpdate, rule: MatrixRule) -> tuple[Dry, Fraction]:
    """Return the dry run of a number of matrices that divides evenly, and the bucket's count as a multiple of that."""
    first = bucket.entries[0]
    dry, even = Alike(rule, work.part, first.dtype, first.device.type).typical(work.replicas, work.dealt)
    return dry, Fraction(_count(bucket, work), even)


def _held(bucket: Bucket, work: BucketUpdate, rule: MatrixRule) -> int:
    """Return the bytes of temporaries of a bucket's update, on the rank with the most."""
    first, count = bucket.entries[0], _count(bucket, work)
    return Alike(rule, work.part, first.dtype, first.device.type).most_held(count, work.replicas, work.dealt)


def _count(bucket: Bucket, work: BucketUpdate) -> int:
    """Return the number of matrices in an update, of experts on this rank, whichever rank keeps their state."""
    return sum(work.part.count(entry.batch) for entry in bucket.entries)
