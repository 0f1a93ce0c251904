"""The keys of parameter groups: which exist, who reads them, what they are where a group leaves them open.

Every group ends up with the same keys (Hugging Face's Trainer and Accelerate demand it) and with plain values, so
that it survives torch.save and torch.load(weights_only=True). May import `rules`.
"""

from __future__ import annotations

import difflib
from numbers import Real
from typing import Any

from torch import Tensor

from .rules import RULES, Rule
from .rules.rule import one_of

# Keys that every group has and no rule need read. `fused`, `foreach` and `capturable` are put into groups by host
# frameworks (torchtitan); a rule that has such a choice declares the key itself.
COMMON: dict[str, Any] = {
    "rule": None,
    "role": "",
    "reason": "",
    "view": "whole",
    "lr_factor": 1.0,
    "seed": 0,
    "replica_compute": "auto",
    "replica_sync": "none",
    "reduce_dtype": None,
    "shard_state": "none",
    "rounding_steps": 0,  # steps whose weights were rounded stochastically: the optimizer counts them
    "fused": None,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
}
# Where replicas hold the same matrices: they split the work and send the results, each repeats all of it, or what
# `cost` finds cheaper.
REPLICA_COMPUTE = ("auto", "split", "repeat")
# What replicas exchange: nothing, for they bring equal gradients; gradients; the factors of their matrices, where the
# rule has any, and gradients of the rest; or for each matrix what `cost` finds cheaper.
REPLICA_SYNC = ("none", "gradients", "factors", "auto")
# Whether every replica keeps the state of all its matrices, or each matrix's state is at one replica only.
SHARD_STATE = ("none", "zero1")
# Keys that torch, its schedulers and its checkpoints put into groups.
FOREIGN = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}

# What others call them.
OTHER_WORDS = {"wire_dtype": "reduce_dtype", "replica_work": "replica_compute"}


def rule_keys() -> dict[str, dict[str, Any]]:
    """The keys of every rule with their defaults; asked anew each time, because users may register rules."""
    return {name: rule.options() for name, rule in RULES.items()}


def all_keys() -> list[str]:
    """The keys that every group has."""
    return [*COMMON, *dict.fromkeys(key for keys in rule_keys().values() for key in keys if key not in COMMON)]


def rule_class(group: dict[str, Any]) -> type[Rule]:
    name = group.get("rule")
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown; choose one of {', '.join(map(repr, RULES))}")
    return RULES[name]


def group_rule(group: dict[str, Any]) -> Rule:
    """The frozen, validated rule that a group's values describe. Raises ValueError or TypeError."""
    rule = rule_class(group)
    defaults = rule.options()
    values = {key: group[key] for key in defaults if key in group}
    for key, value in values.items():
        free = isinstance(value, Tensor) and value.device.type == "cpu" and not value.ndim
        if free and not group.get("capturable"):
            values[key] = value.item()  # nothing waits for it, and every kernel takes a number
        elif isinstance(defaults[key], float) and isinstance(value, Real) and not isinstance(value, (bool, float)):
            values[key] = float(value)  # momentum=0, or numpy's float32
    return rule(**values)


def plain(value: Any) -> Any:
    """A number that ``torch.load(weights_only=True)`` takes, in the place of numpy's, which schedules hand out."""
    return float(value) if isinstance(value, Real) and type(value).__module__ != "builtins" else value


def check_keys(group: dict[str, Any]) -> None:
    """Refuse a key that no rule knows, or that this group's rule does not read, before it is silently ignored."""
    own = rule_class(group).options()
    for key, value in group.items():
        if key in own or key in COMMON or key in FOREIGN:
            continue
        if key not in all_keys():
            near = [OTHER_WORDS[key]] if key in OTHER_WORDS else difflib.get_close_matches(key, all_keys(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{group['rule']!r} reads {', '.join(sorted(own))}"
            raise ValueError(f"unknown key {key!r}; {hint}")
        default = default_of(key, group)
        if (tuple(value) if isinstance(value, list) and isinstance(default, tuple) else value) != default:
            readers = [name for name, keys in rule_keys().items() if key in keys]
            raise ValueError(
                f"key {key!r} means nothing to rule {group['rule']!r} (it belongs to {', '.join(map(repr, readers))}); "
                f"remove it, or put it into a group of that rule"
            )


def default_of(key: str, group: dict[str, Any]) -> Any:
    """The value of a key that a group leaves open: its rule's default, or that of the first rule that has the key."""
    for keys in (rule_class(group).options(), *rule_keys().values()):
        if key in keys:
            return keys[key]
    return COMMON[key]


def complete(group: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The group with every key. What the optimizer was ``given`` goes for each group whose rule reads it; but groups
    of another rule have their rule's lr, or a share `lr_factor` of the optimizer's. Raises where a key or value is
    wrong."""
    group = {"rule": given["rule"], **group}
    check_keys(group)
    own = RULES[group["rule"]].options()
    shares = group["rule"] == given["rule"] or "lr_factor" in group
    for key in all_keys():
        if key in group:
            continue
        if key == "lr":
            base = given.get("lr", default_of("lr", given))
            factor = group.get("lr_factor", 1.0)
            group[key] = (base if factor == 1 else base * factor) if shares else default_of(key, group)
        elif key in given and (key in own or key in COMMON):
            group[key] = given[key]
        else:
            group[key] = default_of(key, group)
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported; leave it out")
    if bool(group["capturable"]) != bool(given.get("capturable")):
        raise ValueError(
            f"capturable={group['capturable']!r} in a group, but a step is captured as a whole: say capturable=True to "
            f"the optimizer, and leave it out of the groups"
        )
    one_of("replica_compute", group["replica_compute"], REPLICA_COMPUTE)
    one_of("replica_sync", group["replica_sync"], REPLICA_SYNC)
    one_of("reduce_dtype", group["reduce_dtype"], (None, "bfloat16"))
    if group["reduce_dtype"] is not None and group["replica_sync"] not in ("factors", "auto"):
        raise ValueError(
            f"reduce_dtype={group['reduce_dtype']!r} is that of factors, and replica_sync={group['replica_sync']!r} "
            f"exchanges none; choose replica_sync='factors' or 'auto', or leave reduce_dtype out"
        )
    rule = rule_class(group)
    if group["replica_sync"] == "factors" and rule.matrices and not rule.factors:
        raise ValueError(
            f"replica_sync='factors' cannot be with rule {rule.name!r}, whose update is not of low rank: every entry "
            f"of the averaged gradient takes part in it; choose replica_sync='gradients', or rule 'dion'"
        )
    _check_shard_state(group)
    group_rule(group)
    return group


def _check_shard_state(group: dict[str, Any]) -> None:
    one_of("shard_state", group["shard_state"], SHARD_STATE)
    if group["shard_state"] == "none":
        return
    rule, sync = rule_class(group), group["replica_sync"]
    if sync in ("factors", "auto"):
        raise ValueError(
            f"shard_state='zero1' cannot be with replica_sync={sync!r}: replicas that exchange factors keep momenta "
            f"of their own gradients, so that none can do without its own; choose replica_sync='none' or 'gradients', "
            f"or leave shard_state out"
        )
    if rule.matrices and not rule.publishes:
        raise ValueError(
            f"shard_state='zero1' cannot be with rule {rule.name!r}, which writes weights from momenta and "
            f"gradients together, every entry of them; choose rule 'dion' or 'muon', or leave shard_state out"
        )
    if group["replica_compute"] == "repeat":
        raise ValueError(
            "replica_compute='repeat' cannot be with shard_state='zero1': a replica has no state to repeat the work "
            "of others; leave one of them out"
        )
