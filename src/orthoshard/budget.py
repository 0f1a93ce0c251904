"""What a step of a whole plan costs this rank: flops, memory traffic, bytes on the wire, state.

May import `rule`, `rules`, `elementwise`, `groups`, `layout`, `plan`, `cost` and `engine.dryrun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from .cost import all_reduce_bytes
from .elementwise import ElementwiseRule
from .engine.dryrun import Dry, dry_entries, dry_update
from .groups import group_rule
from .layout import Replicas
from .plan import Bucket, BucketUpdate, Plan
from .rule import Rule
from .rules import MatrixRule

# What replicas do, in words.
WORDS: dict[Replicas, str] = {
    "split": "shared out over",
    "repeat": "repeated at",
    "average": "factors averaged over",
    "average_bfloat16": "factors averaged in bfloat16 over",
    "own": "published by owners over",
}


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


def explain_buckets(plan: Plan, groups: Sequence[dict[str, Any]]) -> str:
    """One line a bucket of matrices: how many, how they travel, and what a step of them costs this rank."""
    lines: list[str] = []
    for bucket in plan.buckets:
        group = groups[bucket.group]
        for update in bucket.updates:
            dry = update_dry(bucket, update, group_rule(group))
            before = (
                [f"gradients averaged over {axis}" for axis in update.part.unreduced_axes] if bucket.averaged else []
            )
            how = ["whole matrices at owners"] if update.dealt else []
            ways = [*before, *how, *(WORDS[update.replicas] + f" {axis}" for axis in update.part.replicas)]
            ways += [f"{_bytes(sent)} over {axis} in {calls} calls" for axis, (sent, calls) in dry.by_axis().items()]
            m, n = update.part.matrix
            lines.append(
                f"{update.matrices} {m}×{n} under {group['rule']}: {'; '.join(ways) or 'nothing travels'}; "
                f"{dry.total_flops / 1e9:.3g} GFLOP, {_bytes(dry.wire)} sent"
            )
    return "\n".join(lines)


def _bytes(count: Fraction) -> str:
    return f"{float(count) / 1e6:.3g} MB"


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


def own_gradients_bytes(plan: Plan) -> Fraction:
    """Bytes sent to see that gradients are a replica's own: 16 for each parameter whose gradients should be, over their
    replicas, and 16 over each of their axes."""
    members = [entry for entry in plan.entries if entry.layout.unreduced_axes]
    sources = members[0].layout.unreduced_axes if members else ()
    axes = {axis for entry in members for axis in entry.layout.axes}
    return sum((all_reduce_bytes(16 * len(members), axis.size) for axis in sources), Fraction(0)) + sum(
        (all_reduce_bytes(16, axis.size) for axis in axes), Fraction(0)
    )


def bucket_cost(bucket: Bucket, group: dict[str, Any]) -> Cost:
    """The cost of one bucket's update on this rank."""
    rule, first = group_rule(group), bucket.entries[0]
    state = sum(
        prod(entry.state_layout(slot).local) * slot.dtype.itemsize
        for entry in bucket.entries
        for _, slot in entry.local_slots
    )
    here = sum(prod(entry.layout.local) for entry in bucket.entries)
    sources, size = first.layout.unreduced_axes if bucket.averaged else (), here * first.dtype.itemsize
    reduced = sum((all_reduce_bytes(size, axis.size) for axis in sources), Fraction(0))
    surveyed = here * first.dtype.itemsize  # every gradient is read once before the step
    total = Cost(memory=surveyed, wire=reduced, state=state)
    if isinstance(rule, ElementwiseRule):
        return total + _of(dry_entries(rule, first.dtype, here))
    return sum((_of(update_dry(bucket, update, rule)) for update in bucket.updates), total)


def update_dry(bucket: Bucket, update: BucketUpdate, rule: Rule) -> Dry:
    """One update of a bucket, run dry as on this rank."""
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
