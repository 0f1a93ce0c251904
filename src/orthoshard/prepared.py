"""What a step works with: a plan and its storage, and when they have to be made anew.

A plan depends on groups and parameters, which hosts replace, freeze and edit behind our back, so each step compares a
fingerprint of all of that, and looks whether the optimizer's state is still the tensors that the storage made.
May import everything but the applications and the optimizer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine.storage import Storage
from .groups import group_rule
from .layout import Axis
from .members import refuse_one_for_many
from .plan import Plan, build_plan, check_state

Groups = list[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]
Owners = dict[int, tuple[tuple[Axis, ...], int]]


@dataclass
class Prepared:
    """A plan with its storage, what it was made for, who owns the state of which parameter (by identity), and whether
    it was compared with the other ranks'."""

    fingerprint: tuple[Any, ...]
    plan: Plan
    stores: list[Storage]
    owners: Owners
    compared: bool = False

    def holds(self, groups: Groups, state: State) -> bool:
        """Whether nothing has changed that this was made for."""
        return self.fingerprint == _fingerprint(groups) and self.bound(groups, state)

    def bound(self, groups: Groups, state: State) -> bool:
        return all(
            store.bound([groups[e.group]["params"][e.index] for e in store.bucket.entries], state)
            for store in self.stores
        )


def prepare(old: Prepared | None, groups: Groups, state: State, process_group: Any) -> Prepared:
    """The ``old`` one while it still holds; else a new one, whose storage takes over what ``state`` has."""
    if old is not None and old.holds(groups, state):
        return old
    refuse_one_for_many(groups)
    plan = build_plan(groups, process_group)
    parameters = [groups[entry.group]["params"][entry.index] for entry in plan.entries]
    for entry, parameter in zip(plan.entries, parameters, strict=True):
        check_state(entry, state.get(parameter, {}))
    before: Owners = old.owners if old else {}
    _refuse_other_owners(plan, parameters, before, state)
    with torch.no_grad():
        stores = [_storage(bucket, groups, state) for bucket in plan.buckets]
        _release(state, {id(parameter) for parameter in parameters})
    owners = {id(parameter): (e.owners, e.owner) for e, parameter in zip(plan.entries, parameters, strict=True)}
    return Prepared(_fingerprint(groups), plan, stores, {**before, **owners})


def _fingerprint(groups: Groups) -> tuple[Any, ...]:
    """Everything a plan depends on."""
    slots = [group_rule(group).slots((64, 64), torch.float32) for group in groups]
    members = [
        (id(p), p.shape, p.dtype, p.device, p.requires_grad, getattr(p, "placements", None))
        for group in groups
        for p in group["params"]
    ]
    names = ("rule", "replica_compute", "replica_sync", "reduce_dtype", "view", "shard_state")
    keys = [tuple(group[name] for name in names) for group in groups]
    return (keys, slots, members)


def _refuse_other_owners(plan: Plan, parameters: list[Tensor], before: Owners, state: State) -> None:
    """State does not move between replicas in a step. Asked of every rank alike, whoever has the state."""
    for entry, parameter in zip(plan.entries, parameters, strict=True):
        owners, owner = before.get(id(parameter), ((), 0))
        if owners and parameter in state and (owners, owner) != (entry.owners, entry.owner):
            raise ValueError(
                f"the state of parameter {entry.name!r} is with one replica and would have to be with others: "
                f"shard_state, earlier groups and their order stay as they are once there is state; build a new "
                f"optimizer and load this one's state_dict()"
            )


def _storage(bucket: Any, groups: Groups, state: State) -> Storage:
    group = groups[bucket.group]
    return Storage(bucket, [group["params"][e.index] for e in bucket.entries], group["seed"], state)


def _release(state: State, planned: set[int]) -> None:
    """State of parameters that are frozen now becomes their own, so that it does not keep a whole bucket alive."""
    for parameter, held in state.items():
        if id(parameter) not in planned:
            held.update({key: value.clone() for key, value in held.items() if isinstance(value, Tensor)})
