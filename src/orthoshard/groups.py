"""The keys of parameter groups: which exist, who reads them, what they are where a group leaves them open.

Every group ends up with the same keys (Hugging Face's Trainer and Accelerate demand it) and with plain values, so
that it survives torch.save and torch.load(weights_only=True). May import `rules`.
"""

from __future__ import annotations

import difflib
from typing import Any

from .rules import RULES, Rule

# Keys that every group has and no rule need read. `fused`, `foreach` and `capturable` are put into groups by host
# frameworks (torchtitan); a rule that has such a choice declares the key itself.
COMMON: dict[str, Any] = {
    "rule": None,
    "role": "",
    "reason": "",
    "lr_factor": 1.0,
    "seed": 0,
    "fused": None,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
}
# Keys that torch, its schedulers and its checkpoints put into groups.
FOREIGN = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}

RULE_KEYS = {name: rule.keys() for name, rule in RULES.items()}
ALL_KEYS = [*COMMON, *dict.fromkeys(key for keys in RULE_KEYS.values() for key in keys if key not in COMMON)]


def rule_class(group: dict[str, Any]) -> type[Rule]:
    name = group.get("rule")
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown; choose one of {', '.join(map(repr, RULES))}")
    return RULES[name]


def group_rule(group: dict[str, Any]) -> Rule:
    """The frozen, validated rule that a group's values describe. Raises ValueError or TypeError."""
    rule = rule_class(group)
    return rule(**{key: group[key] for key in RULE_KEYS[group["rule"]] if key in group})


def check_keys(group: dict[str, Any]) -> None:
    """Refuse a key that no rule knows, or that this group's rule does not read, before it is silently ignored."""
    own = RULE_KEYS[rule_class(group).name]
    for key, value in group.items():
        if key in own or key in COMMON or key in FOREIGN:
            continue
        if key not in ALL_KEYS:
            near = difflib.get_close_matches(key, ALL_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{group['rule']!r} reads {', '.join(sorted(own))}"
            raise ValueError(f"unknown key {key!r}; {hint}")
        if value != default_of(key, group):
            readers = [name for name, keys in RULE_KEYS.items() if key in keys]
            raise ValueError(
                f"key {key!r} means nothing to rule {group['rule']!r} (it belongs to {', '.join(map(repr, readers))}); "
                f"remove it, or put it into a group of that rule"
            )


def default_of(key: str, group: dict[str, Any]) -> Any:
    """The value of a key that a group leaves open: its rule's default, or that of the first rule that has the key."""
    for keys in (RULE_KEYS[rule_class(group).name], *RULE_KEYS.values()):
        if key in keys:
            return keys[key]
    return COMMON[key]


def complete(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The group with every key. Groups of the optimizer's own rule take its values; others their rule's defaults,
    and a share `lr_factor` of its lr where they name one. Raises where a key or value is wrong."""
    group = {"rule": defaults["rule"], **group}
    check_keys(group)
    inherits = group["rule"] == defaults["rule"]
    for key in ALL_KEYS:
        if key in group:
            continue
        if key == "lr" and (inherits or "lr_factor" in group):
            group[key] = defaults["lr"] * group.get("lr_factor", 1.0)
        elif inherits or key == "seed":
            group[key] = defaults[key]
        else:
            group[key] = default_of(key, group)
    group_rule(group)
    return group
