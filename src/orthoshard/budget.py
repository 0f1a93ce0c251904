"""The cost of a step of a whole plan on this rank: flops, memory traffic, bytes on the wire, state.

May import `rule`, `rules`, `elementwise`, `groups`, `layout`, `plan`, `cost` and `engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

from .cost import all_reduce_bytes
from .elementwise import ElementwiseRule
from .engine import replicas
from .engine.dryrun import Dry, dry_entries, dry_gram, dry_update
from .groups import group_rule
from .layout import Axis
from .plan import Bucket, BucketUpdate, Plan
from .rule import Rule
from .rules import MatrixRule


@dataclass(frozen=True)
class Cost:
    """The cost of one step on this rank.

    flops   multiplications and additions
    memory  bytes read and written by passes over whole matrices and vectors
    wire    bytes that this rank sends for the updates
    state   bytes of optimizer state on this rank
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
    """Return the cost of a step in which every parameter has a gradient, without the agreement on gradients."""
    return sum((bucket_cost(bucket, groups[bucket.group]) for bucket in plan.buckets), Cost())


def agreement(plan: Plan) -> Iterator[tuple[Axis, Fraction]]:
    """Yield (axis, bytes sent) of each collective by which ranks agree on a step's gradients. Each mesh reduces 32
    bytes, and 16 more for each of its parameters and each of its groups; with several meshes, 32 once more."""
    for axes, members in plan.meshes:
        groups = {plan.entries[i].group for i in members}
        for numbers in (2 * (len(members) + len(groups)) + 4, *((4,) if len(plan.meshes) > 1 else ())):
            for axis in axes:
                yield axis, all_reduce_bytes(8 * numbers, axis.size)


def agreement_bytes(plan: Plan) -> Fraction:
    """Return the bytes sent to agree on the gradients of a step."""
    return sum((size for _, size in agreement(plan)), Fraction(0))


def averaging(bucket: Bucket) -> Iterator[tuple[Axis, Fraction]]:
    """Yield (axis, bytes) of each collective that averages gradients over replicas, in pieces as `engine.replicas`."""
    for axis in bucket.entries[0].layout.unreduced_axes if bucket.averaged else ():
        size, item = 0, bucket.entries[0].dtype.itemsize
        for more in (prod(entry.layout.local) * item for entry in bucket.entries):
            if size and size + more > replicas.PIECE_BYTES:
                yield axis, all_reduce_bytes(size, axis.size)
                size = 0
            size += more
        if size:
            yield axis, all_reduce_bytes(size, axis.size)


def bucket_cost(bucket: Bucket, group: dict[str, Any]) -> Cost:
    """Return the cost of one bucket's update on this rank."""
    rule, first = group_rule(group), bucket.entries[0]
    state = sum(entry.state_bytes for entry in bucket.entries)
    here = sum(prod(entry.layout.local) for entry in bucket.entries)
    reduced = sum((size for _, size in averaging(bucket)), Fraction(0))
    surveyed = here * first.dtype.itemsize  # every gradient is read once before the step
    total = Cost(memory=surveyed, wire=reduced, state=state)
    if isinstance(rule, ElementwiseRule):
        return total + _of(dry_entries(rule, first.dtype, here))
    if first.pair:
        count = sum(entry.batch for entry in bucket.entries)
        part = replace(bucket.updates[0].part, some=(0, 1))
        total += _of(dry_gram(part, first.pair.side, first.dtype, first.device.type, count))
    return sum((_of(update_dry(bucket, update, rule)) for update in bucket.updates), total)


def update_dry(bucket: Bucket, update: BucketUpdate, rule: Rule) -> Dry:
    """Run one update of a bucket dry, as on this rank."""
    assert isinstance(rule, MatrixRule)
    first, shares = bucket.entries[0], tuple(bucket.shares(update))
    return dry_update(
        rule,
        update.part,
        first.dtype,
        first.device.type,
        bucket.local_count(update),
        update.first_owner,
        update.replicas,
        shares,
        update.dealt,
    )


def _of(dry: Dry) -> Cost:
    return Cost(dry.total_flops, dry.memory, dry.wire)
