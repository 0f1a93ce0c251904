"""The plan and storage that a step works with, and when they have to be made anew.

A plan depends on groups and parameters, which hosts may replace, freeze and edit at any time. So each step compares a
fingerprint of all of them, and checks that the optimizer's state is still where it was put.
May import everything but the applications and the optimizer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine.storage import Memory, Storage
from .groups import CHOICES, group_rule
from .layout import PLACED, Axis, alive
from .plan import Plan, build_plan, check_state, options_of
from .validate import refuse_flat

Groups = list[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]
Owners = dict[int, tuple[tuple[Axis, ...], int]]


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made for: ``fingerprint``, which each step compares, and ``said``, the names of parameters
    and the options of rules, some of which schedulers change from step to step."""

    fingerprint: tuple[Any, ...]
    said: list[Any]
    plan: Plan


def planned(old: Planned | None, groups: Groups, process_group: Any) -> Planned:
    """Return the plan of these groups: the ``old`` one if nothing has changed and its process groups still exist."""
    fingerprint = _fingerprint(groups, process_group)
    said = [(options_of(group), list(group.get("param_names") or ())) for group in groups]
    if old and (old.fingerprint, old.said) == (fingerprint, said) and all(map(alive, old.plan.groups)):
        return old
    refuse_flat(groups)
    return Planned(fingerprint, said, build_plan(groups, process_group))


@dataclass
class Prepared:
    """A plan with the memory of its state. ``owners``: the owner of each parameter's state, by the parameter's
    identity; ``compared``: whether the plan was compared with other ranks'; ``present``: for steps that never read the
    device, which parameters have a gradient, as all ranks have agreed."""

    fingerprint: tuple[Any, ...]
    plan: Plan
    memories: list[Memory]
    owners: Owners
    compared: bool = False
    present: tuple[bool, ...] | None = None

    def bind(self, groups: Groups, state: State, process_group: Any, sends: bool = True) -> list[Storage] | None:
        """Return the state of each bucket for one step, or None if anything has changed since this was made.
        ``sends``: process groups must still exist."""
        if self.fingerprint != _fingerprint(groups, process_group):
            return None
        if sends and not all(map(alive, self.plan.groups)):
            return None
        stores: list[Storage] = []
        for memory in self.memories:
            store = memory.bind(memory.bucket.parameters(groups), state)
            if store is None:
                return None
            stores.append(store)
        return stores


def prepare(
    old: Prepared | None, made: Planned, groups: Groups, state: State, process_group: Any, sends: bool
) -> tuple[Prepared, list[Storage]]:
    """Return a plan with new memory, which replaces the ``old`` one and takes over the tensors of ``state``, and the
    state of each bucket for one step."""
    plan, before = made.plan, old.owners if old else {}
    parameters = plan.parameters(groups)
    for entry, parameter in zip(plan.entries, parameters, strict=True):
        check_state(entry, state.get(parameter, {}))
    _refuse_other_owners(plan, parameters, before, state)
    with torch.no_grad():
        memories = [
            Memory(bucket, bucket.parameters(groups), groups[bucket.group]["seed"], state) for bucket in plan.buckets
        ]
        _release(state, {id(parameter) for parameter in parameters})
    owners = {id(parameter): (e.owners, e.owner) for e, parameter in zip(plan.entries, parameters, strict=True)}
    prepared = Prepared(made.fingerprint, plan, memories, {**before, **owners})
    stores = prepared.bind(groups, state, process_group, sends)
    assert stores is not None
    return prepared, stores


def _fingerprint(groups: Groups, process_group: Any) -> tuple[Any, ...]:
    """Return everything that a plan depends on."""
    rules = [group_rule(group) for group in groups]
    # Directions that round ranks differently may have equal slots for (64, 64), so the direction is compared as well.
    slots = [(getattr(rule, "direction", None), rule.slots((64, 64), torch.float32)) for rule in rules]
    members = [
        (id(p), p.shape, p.dtype, p.device, p.requires_grad, *(getattr(p, name, None) for name in PLACED))
        for group in groups
        for p in group["params"]
    ]
    keys = [[group[name] for name in ("rule", "view", "state_offload", *CHOICES)] for group in groups]
    return (keys, slots, members, process_group)


def _refuse_other_owners(plan: Plan, parameters: list[Tensor], before: Owners, state: State) -> None:
    """Refuse a new owner of existing state: a step does not move state between replicas. Every rank raises alike,
    whether or not it has the state."""
    for entry, parameter in zip(plan.entries, parameters, strict=True):
        owners, owner = before.get(id(parameter), ((), 0))
        if owners and parameter in state and (owners, owner) != (entry.owners, entry.owner):
            raise ValueError(
                f"the state of parameter {entry.name!r} is at one replica and would have to move to others: "
                f"shard_state, earlier groups and their order cannot change once there is state; build a new "
                f"optimizer and load this one's state_dict()"
            )


def _release(state: State, planned: set[int]) -> None:
    """Copy the state of parameters that are frozen now, so that it does not keep a whole bucket alive."""
    for parameter, held in state.items():
        if id(parameter) not in planned:
            held.update({key: value.clone() for key, value in held.items() if isinstance(value, Tensor)})
