"""State dicts: completed before they are returned, checked before they are loaded.

torch casts loaded state to the dtype of its parameter, but our state keeps its own dtype. So state tensors pass through
torch's loading in an opaque wrapper. May import everything but the applications and the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .capturable import as_ours
from .engine.comm import Comm
from .engine.gathered import gathered_state
from .engine.meeting import meet
from .engine.replicas import average_state
from .engine.storage import Storage
from .groups import DEPLOYMENT, all_keys, check_values, default_of, group_rule, rule_class
from .plan import TRAINABLE, Plan, check_state, offloads
from .prepared import Groups, Planned, planned
from .slots import EIGHT_BITS, state_device, state_dtype

F32 = torch.float32


@dataclass(frozen=True)
class _Kept:
    """A saved state tensor in a wrapper that torch's loading passes through without a cast."""

    tensor: Tensor
    device: torch.device

    def unwrapped(self) -> Tensor:
        return self.tensor.detach().to(self.device, copy=True)


def keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict in the order of our groups, with each state tensor wrapped: a hook for torch's loading."""
    state_dict = in_our_order(optimizer.param_groups, state_dict)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    ours = [
        state_device(parameter.device, offloads(group, parameter))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    devices = dict(zip(numbers, ours, strict=False))  # torch compares the numbers of parameters itself
    state = {
        number: {
            key: _Kept(value, devices[number]) if isinstance(value, Tensor) and number in devices else value
            for key, value in held.items()
        }
        for number, held in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def in_our_order(ours: Groups, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state dict, grouped as ``ours`` if both have the same names. Otherwise return it as it is, to be
    matched by position as in torch.

    State loaded by torch.distributed.checkpoint has names instead of numbers, and is in our order already; its groups
    keep the ``param_names`` that were saved. Raises ValueError if a group of ours has parts of several saved groups.
    """
    saved = {
        name: (number, group)
        for group in state_dict["param_groups"]
        for name, number in zip(group.get("param_names") or (), group["params"], strict=False)
    }
    names = [group.get("param_names") or [] for group in ours]
    count = sum(len(group["params"]) for group in state_dict["param_groups"])
    numbered = len(saved) == count and all(isinstance(number, int) for number, _ in saved.values())
    if not numbered or saved.keys() != {name for each in names for name in each}:
        return state_dict
    groups: Groups = []
    for number, members in enumerate(names):
        sources = {id(saved[name][1]): name for name in members}
        if len(sources) > 1:
            first, second, *_ = sources.values()
            raise ValueError(
                f"group {number} has the parameters {first!r} and {second!r}, which this state has in two groups: "
                f"build the optimizer with the groups that the state was saved with"
            )
        numbers = [saved[name][0] for name in members]
        groups.append({**saved[members[0]][1], "params": numbers, "param_names": members})
    return {**state_dict, "param_groups": groups}


def adopt(state: dict[str, Any], ours: Groups | None, process_group: Any, before: Planned | None) -> Planned | None:
    """Complete the groups of ``state`` that torch loaded, unpickled or copied, unwrap its tensors, and return its plan.

    ``ours``: the groups of the optimizer that takes the state, if it has any, and ``before`` their plan. Raises
    ValueError for state that does not fit, before a state tensor is touched.
    """
    groups: Groups = state["param_groups"]
    for number, group in enumerate(groups):
        _adopt_group(number, group, (ours or groups)[number])
    if ours is None:  # a copy, or unpickled, perhaps without its process group: the first step checks the state
        return None
    others = set[int]()  # parameters whose state another replica keeps
    made = planned(before, groups, process_group)
    plan = made.plan
    for entry, parameter in zip(plan.entries, plan.parameters(groups), strict=True):
        held = state["state"].get(parameter, {})
        check_state(entry, {key: v.tensor if isinstance(v, _Kept) else v for key, v in held.items()})
        if not entry.is_owner:
            others.add(id(parameter))
    for parameter, held in state["state"].items():
        for key, value in list(held.items()):
            if id(parameter) in others:
                del held[key]
            elif isinstance(value, _Kept):
                held[key] = value.unwrapped()
    return made


def _adopt_group(number: int, group: dict[str, Any], ours: dict[str, Any]) -> None:
    if "rule" not in group:
        raise ValueError("this state has no 'rule' in its groups: it was saved by another optimizer")
    if group["rule"] != ours["rule"]:
        raise ValueError(
            f"group {number} of this state was saved under rule {group['rule']!r}, and is {ours['rule']!r} "
            f"here: build the optimizer with the rules that it was saved with"
        )
    for key in all_keys():
        group.setdefault(key, default_of(key, group))
    for key in ours:
        group.setdefault(key, ours[key])  # keys of hosts and users
    for key in DEPLOYMENT:
        group[key] = ours[key]
    _refuse_other_bits(number, group, ours)
    group["param_names"] = list(ours["param_names"])  # torch takes the saved names, even those of another grouping
    as_ours(group, ours)
    view = ours["view"]
    if group["view"] != view:
        raise ValueError(
            f"group {number} of this state was saved with view={group['view']!r}, and has {view!r} here: its "
            f"momentum belongs to other matrices; build the optimizer with the views that it was saved with"
        )
    _refuse_other_stages(number, group, ours)
    check_values(group)


def _refuse_other_bits(number: int, group: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse state of another dtype than ours, which would silently change the option and the memory that it takes."""
    group_rule(group)  # refuses unknown dtypes
    saved, here = group["state_dtype"], ours["state_dtype"]
    dtypes = {parameter.dtype for parameter in ours["params"] if parameter.dtype in TRAINABLE}
    alike = all(state_dtype(saved, dtype) == state_dtype(here, dtype) for dtype in dtypes)
    if rule_class(ours).matrices and not (alike and (saved == EIGHT_BITS) == (here == EIGHT_BITS)):
        raise ValueError(
            f"group {number} of this state was saved with state_dtype={saved!r}, and has {here!r} here: build the "
            f"optimizer with state_dtype={saved!r}, load the state, and then call optimizer.convert_state({here!r})"
        )
    group["state_dtype"] = here


def _refuse_other_stages(number: int, group: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse state if only one side has a stage, whose state would be missing or left over."""
    saved, here = ({type(stage): stage for stage in getattr(group_rule(each), "stages", ())} for each in (group, ours))
    for kind in {*saved, *here}:
        if kind in saved and kind in here and saved[kind].slots((1, 1), F32) == here[kind].slots((1, 1), F32):
            continue
        key = next(key for key in kind.options() if group[key] != ours[key])
        raise ValueError(
            f"group {number} of this state was saved with {key}={group[key]!r}, and has {ours[key]!r} here: build the "
            f"optimizer with the stages that it was saved with"
        )


def complete(
    saved: dict[int, dict[str, Any]], plan: Plan, stores: Sequence[Storage], groups: Groups, comm: Comm
) -> None:
    """Complete a saved state: replace momenta of this replica by the means over all, and add the state that other
    replicas keep."""
    meet(plan.groups, "state_dict()")
    numbers = {id(parameter): number for number, parameter in enumerate(p for group in groups for p in group["params"])}
    held = [local for store in stores for local in store.locals]
    means = average_state(plan, held, comm)
    gathered = gathered_state(plan, stores, comm)
    for entry, parameter, mean, whole in zip(plan.entries, plan.parameters(groups), means, gathered, strict=True):
        number, slots = numbers[id(parameter)], dict(entry.slots)
        wrapped = {name: entry.state_layout(slots[name]).wrap(piece) for name, piece in {**mean, **whole}.items()}
        if wrapped:
            saved[number] = {**saved[number], **wrapped}
