"""The keys of parameter groups: which exist, who reads them, what they are where a group leaves them open.

Every group ends up with the same keys (Hugging Face's Trainer and Accelerate demand it) and with plain values, so
that it survives torch.save and torch.load(weights_only=True). Keys that hosts and users add for themselves (``name``)
stay as they are. May import `rules`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from .checks import one_of, switch
from .rule import Rule
from .rules import RULES, RuleType
from .slots import EIGHT_BITS

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
    "shard_compute": "auto",
    "replica_sync": "none",
    "reduce_dtype": None,
    "shard_state": "none",
    "state_offload": False,
    "rounding_steps": 0,  # steps whose weights were rounded stochastically: the optimizer counts them
    "fused": None,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    # Where replicas hold the same matrices: they split the work and send the results, each repeats all of it, or what
    # `cost` finds cheaper.
    "replica_compute": ("auto", "split", "repeat"),
    # What replicas exchange: nothing, for they bring equal gradients; gradients; the factors of their matrices, where
    # the rule has any, and gradients of the rest; or for each matrix what `cost` finds cheaper.
    "replica_sync": ("none", "gradients", "factors", "auto"),
    # In which dtype these factors travel.
    "reduce_dtype": (None, "bfloat16"),
    # Where matrices are cut: the direction runs on the pieces and thin things travel, or whole matrices are dealt out
    # to owners and U or its factors come back, or what is cheaper by the dry run.
    "shard_compute": ("auto", "in_place", "dealt"),
    # Whether every replica keeps the state of all its matrices, or each matrix's state is at one replica only.
    "shard_state": ("none", "zero1"),
}
# Common keys that are said of a group, and not to a whole optimizer.
OF_GROUPS = {"role", "reason", "view", "lr_factor", "rounding_steps"}
# Keys that say where and how a step runs, or how it rounds weights. No checkpoint brings them: they stay what the
# optimizer was built with, and what was saved under one value loads under another.
DEPLOYMENT = (*CHOICES, "state_offload", "fused", "foreach", "capturable", "differentiable", "rounding")
# Keys that torch, its schedulers and its checkpoints put into groups.
FOREIGN = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
# Keys into which OneCycleLR and CyclicLR write a momentum, in groups of every rule, where they also leave its bounds.
CYCLED, BOUNDS = {"momentum", "betas"}, {"max_momentum", "base_momentum"}
# What a constructor reads beside the keys of groups.
ARGUMENTS = ("process_group", "drift_check", "kernels", "scalar", "scalar_lr", "scalar_weight_decay", "scalar_betas")

# What torch.optim's AdamW and Muon, K. Jordan's and Moonlight's Muon, microsoft/dion, GaLore, timm and Megatron call
# what we call otherwise; and our own words of before. Of several keys the first one that is read is meant.
OTHER_WORDS: dict[str, str] = {
    "lr": "learning_rate learn_rate step_size base_lr",
    "weight_decay": "wd decay weight_decay_rate wd_mult decay_mult weight_decay_mult",
    "momentum": "mu beta beta1 momentum_beta",
    "betas": "mu beta beta1 beta2 adam_beta1 adam_beta2",
    "eps": "epsilon adam_epsilon",
    "rank_fraction": "rank rank_ratio rank_frac",
    "scale": "adjust_lr adjust_lr_fn rms_scale match_rms",
    "polar": "ns_steps ns_coefficients num_ns_steps backend backend_steps newton_schulz_steps use_polar_express",
    "state_dtype": "momentum_dtype mixed_precision_config",
    "rule": "use_muon use_dion use_adamw algorithm kind optimizer_type",
    "lr_factor": "lr_scale lr_mult lr_multiplier",
    "scalar": "scalar_optimizer aux_optimizer",
    "scalar_lr": "adam_lr adamw_lr aux_lr embed_lr head_lr",
    "scalar_weight_decay": "adam_wd adamw_wd adam_weight_decay adamw_weight_decay",
    "scalar_betas": "adam_betas adamw_betas aux_betas",
    "process_group": "distributed_mesh replicate_mesh device_mesh",
    "replica_sync": "replicate_mesh_grad_sync",
    "reduce_dtype": "wire_dtype",
    "replica_compute": "replica_work",
    "view": "flatten",
}
# How near a group's key must be to one of ours to be taken for a slip: "rank_fractoin" 0.92, "name" beside any 0.57.
SLIP = 0.75
# What a rule can be remembered by.
PLAIN = (bool, int, float, str, type(None))


def rule_keys() -> dict[str, dict[str, Any]]:
    """The keys of every rule with their defaults; asked anew each time, because users may register rules."""
    return {name: rule.options() for name, rule in RULES.items()}


def all_keys() -> list[str]:
    """The keys that every group has."""
    return [*COMMON, *dict.fromkeys(key for keys in rule_keys().values() for key in keys if key not in COMMON)]


def rule_class(group: dict[str, Any]) -> RuleType:
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
        elif isinstance(value, list) and isinstance(defaults[key], tuple):
            values[key] = tuple(value)
        elif isinstance(defaults[key], float) and isinstance(value, Real) and not isinstance(value, (bool, float)):
            values[key] = float(value)  # momentum=0, or numpy's float32
    if any(type(value) not in PLAIN for value in values.values()):
        return rule(**values)
    return _same_rule(rule, tuple(defaults), tuple((key, type(value), value) for key, value in values.items()))


@lru_cache(maxsize=256)
def _same_rule(rule: RuleType, keys: tuple[str, ...], values: tuple[tuple[str, type, Any], ...]) -> Rule:
    """Asked for several times a step. Types belong to the key, for True == 1; and ``keys``, for stages may be added."""
    return rule(**{key: value for key, _, value in values})


def plain(value: Any) -> Any:
    """A number that ``torch.load(weights_only=True)`` takes, in the place of numpy's, which schedules hand out."""
    return float(value) if isinstance(value, Real) and type(value).__module__ != "builtins" else value


def check_options(given: dict[str, Any], beside: set[str] = OF_GROUPS) -> None:
    """Refuse what an optimizer is ``given`` for the groups of its rule and nothing would read, whatever its value.
    ``beside``: keys that are said elsewhere."""
    own = rule_class(given).options()
    for key in given:
        if key in own or (key in COMMON and (key not in beside or given[key] == COMMON[key])):
            continue  # hosts build anew from `defaults`, which have every common key
        if key in COMMON:
            raise ValueError(f"{key!r} is a key of single groups: put it into one, or into overrides of param_groups")
        if key in all_keys():
            raise ValueError(_not_read(key, given["rule"]))
        hint = _hint(key, own, [*own, *COMMON, *ARGUMENTS], 0.6) or f"{given['rule']!r} reads {', '.join(sorted(own))}"
        raise ValueError(f"unknown key {key!r}; {hint}")


def refuse_unread(rule: Rule, said: dict[str, Any]) -> None:
    """Refuse an option of the rule that nothing reads beside the others that were ``said``. Hosts hand on defaults."""
    for key, why in rule.unread.items():
        if key in said and said[key] not in (0, default_of(key, said)):
            raise ValueError(f"{key}={said[key]!r} has no effect, for {why}")


def check_keys(group: dict[str, Any]) -> None:
    """Refuse a key that this group's rule does not read, and one that looks like a slip or another word for one of
    ours, before it is silently ignored. Other keys belong to hosts and users."""
    own = rule_class(group).options()
    for key, value in group.items():
        if key in own or key in COMMON or key in FOREIGN or (key in CYCLED and group.keys() >= BOUNDS):
            continue
        if key not in all_keys():
            if hint := _hint(key, own, all_keys(), SLIP):
                raise ValueError(f"unknown key {key!r}; {hint}")
            continue
        default = default_of(key, group)  # which is in every group, for all have the same keys
        if (tuple(value) if isinstance(value, list) and isinstance(default, tuple) else value) != default:
            raise ValueError(_not_read(key, group["rule"]))


def _hint(key: str, own: Iterable[str], known: Iterable[str], cutoff: float) -> str:
    """Which of our words a user may have meant, rather one that the rule reads (``own``); "" where none is near."""
    words = [ours for ours, theirs in OTHER_WORDS.items() if key.lower() in theirs.split()]
    near = words or difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
    meant = [ours for ours in near if ours in own] or near
    return f"did you mean {meant[0]!r}?" if meant else ""


def _not_read(key: str, rule: str) -> str:
    readers = [name for name, keys in rule_keys().items() if key in keys]
    scalar = f"; for what is no matrix of a model say scalar_{key}" if f"scalar_{key}" in ARGUMENTS else ""
    return (
        f"key {key!r} means nothing to rule {rule!r} (it belongs to {', '.join(map(repr, readers))}); remove it, or "
        f"put it into a group of that rule{scalar}"
    )


def made_up(group: int, index: int) -> str:
    """The name of a parameter that was given none."""
    return f"group {group}, parameter {index}"


def default_of(key: str, group: dict[str, Any]) -> Any:
    """The value of a key that a group leaves open: its rule's default, or that of the first rule that has the key."""
    for rule in (rule_class(group), *RULES.values()):
        if key in (keys := rule.options()):
            return keys[key]
    return COMMON[key]


def complete(group: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The group with every key. What the optimizer was ``given`` goes for each group whose rule reads it; but groups
    of another rule have their rule's lr, or a share `lr_factor` of the optimizer's. Raises where a key or value is
    wrong."""
    group = {"rule": given["rule"], **group}
    said = dict(group)
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
    for key in all_keys():  # schedulers fill them in place, group by group: no two groups may share one
        if isinstance(group[key], Tensor):
            group[key] = group[key].detach().clone()
    if bool(group["capturable"]) != bool(given.get("capturable")):
        raise ValueError(
            f"capturable={group['capturable']!r} in a group, but a step is captured as a whole: say capturable=True to "
            f"the optimizer, and leave it out of the groups"
        )
    refuse_unread(check_values(group), said)
    return group


def check_values(group: dict[str, Any]) -> Rule:
    """The rule of a group that has every key. Raises ValueError or TypeError for values that are none, or that do not
    go together."""
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported; leave it out")
    if not isinstance(group["view"], str):
        raise TypeError(f"view={group['view']!r} must be the name of a view, such as 'whole' or 'rows:64,16,16'")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], Integral):
        raise TypeError(f"seed={group['seed']!r} must be a whole number")
    for key, choices in CHOICES.items():
        one_of(key, group[key], choices)
    if group["reduce_dtype"] is not None and group["replica_sync"] not in ("factors", "auto"):
        raise ValueError(
            f"reduce_dtype={group['reduce_dtype']!r} is that of factors, and replica_sync={group['replica_sync']!r} "
            f"exchanges none; choose replica_sync='factors' or 'auto', or leave reduce_dtype out"
        )
    _check_shard_state(group)
    switch("state_offload", group["state_offload"])
    rule = group_rule(group)
    if group["replica_sync"] == "factors" and group["state_dtype"] == EIGHT_BITS:
        raise ValueError(
            f"replica_sync='factors' does not go with state_dtype={EIGHT_BITS!r}: replicas then keep momenta of their "
            f"own, whose mean is the momentum, and means of rounded momenta are not; choose "
            f"replica_sync='gradients', or another state_dtype"
        )
    if group["replica_sync"] == "factors" and rule.matrices and not rule.factors:
        raise ValueError(
            f"replica_sync='factors' does not go with rule {group['rule']!r} and its stages, whose update is not of "
            f"low rank in the averaged gradient: every entry of it takes part; choose replica_sync='gradients', or "
            f"rule 'dion' without equilibrate"
        )
    return rule


def _check_shard_state(group: dict[str, Any]) -> None:
    if group["shard_state"] == "none":
        return
    sync = group["replica_sync"]
    if sync in ("factors", "auto"):
        raise ValueError(
            f"shard_state='zero1' does not go with replica_sync={sync!r}: replicas that exchange factors keep momenta "
            f"of their own gradients, so that none can do without its own; choose replica_sync='none' or 'gradients', "
            f"or leave shard_state out"
        )
    if group["replica_compute"] == "repeat":
        raise ValueError(
            "replica_compute='repeat' does not go with shard_state='zero1': a replica has no state to repeat the work "
            "of others; leave one of them out"
        )
