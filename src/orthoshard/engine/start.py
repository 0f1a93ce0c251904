"""Checks of the weights' values, made once: before the first step, by all ranks together.

At construction a sharded weight cannot be checked without a collective, and one on meta not at all; both are checked
before the first step. May import torch, `linalg`, `rule`, `rules`, `plan`, `layout` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import local_of
from ..linalg.scale import largest
from ..plan import Bucket, Plan
from ..rule import Rule
from ..rules import MatrixRule
from .comm import Comm


def refuse_zero_starts(plan: Plan, groups: Sequence[dict[str, Any]], rules: Sequence[Rule], comm: Comm | None) -> None:
    """Check that no matrix is zero if a stage of its rule cannot start there. Raises
    ValueError on every rank otherwise.

    ``rules``: one per group. Without ``comm`` only weights that are here, whole, are checked.
    """
    why: dict[str, str] = {}
    found = set[str]()
    for bucket in plan.buckets:
        rule, first = rules[bucket.group], bucket.entries[0]
        reason = (
            next((s.not_from_zero for s in rule.stages if s.not_from_zero), "") if isinstance(rule, MatrixRule) else ""
        )
        if not reason or (comm is None and (any(first.layout.shard_axes) or first.device.type == "meta")):
            continue
        why |= {entry.name: reason for entry in bucket.entries}
        weights = [local_of(parameter).detach() for parameter in bucket.parameters(groups)]
        found |= {e.name for e, zero in zip(bucket.entries, _zero(bucket, weights, comm), strict=True) if zero}
    if not why:
        return
    numbers = torch.tensor([float(entry.name in found) for entry in plan.entries], dtype=torch.float64)
    for axes, members in plan.meshes:
        if comm is None:
            break
        known = numbers[members].to(plan.entries[members[0]].device)
        numbers[members] = comm.reduced(known, axes, "max").cpu()
    for entry, number in zip(plan.entries, numbers.tolist(), strict=True):
        if number:
            raise ValueError(f"parameter {entry.name!r} has a matrix that is zero, and {why[entry.name]}")


def _zero(bucket: Bucket, weights: Sequence[Tensor], comm: Comm | None) -> list[bool]:
    """Return which weights have a matrix that is zero, as far as a piece of it is here."""
    zero = [False] * len(weights)
    for update in bucket.updates:
        sizes = [
            largest(update.part.view_of(e.stack(w))).double() for e, w in zip(bucket.entries, weights, strict=True)
        ]
        together = torch.cat(sizes)
        if comm is not None:
            comm.reduced(together, update.part.over("both"), "max")
        flags = [bool((part == 0).any()) for part in together.split([len(size) for size in sizes])]
        zero = [a or b for a, b in zip(zero, flags, strict=True)]
    return zero
