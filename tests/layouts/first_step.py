"""What the first step sends beside every other one: the oracle of its bytes."""

from __future__ import annotations

from fractions import Fraction

from orthoshard.cost import all_reduce_bytes
from orthoshard.plan import Plan


def comparison_bytes(plan: Plan) -> Fraction:
    """Bytes sent once, to compare plans: 16 for their length and 16 for each parameter of a mesh, over each axis."""
    return sum(
        (
            all_reduce_bytes(size, axis.size)
            for axes, members in plan.meshes
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
