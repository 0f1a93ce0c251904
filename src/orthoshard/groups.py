"""The keys of parameter groups: which exist, which rule reads them, and their defaults.

Every completed group has the same keys, because Hugging Face's Trainer and Accelerate demand it, and plain values, so
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

# Keys that every group has, whether or not its rule reads them. Host frameworks (torchtitan) put `fused`, `foreach` and
# `capturable` into groups; a rule that offers such a choice declares the key itself.
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
    "rounding_steps": 0,  # steps that rounded weights stochastically; the optimizer counts them
    "fused": None,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    # Replicas that hold the same matrices either split the work and send the results, or each repeat all of it;
    # "auto": what `cost` finds cheaper.
    "replica_compute": ("auto", "split", "repeat"),
    # What replicas exchange. "none": nothing, because their gradients are equal. "factors": the factors of their
    # matrices if the rule has any, and gradients of the rest. "auto": for each matrix what `cost` finds cheaper.
    "replica_sync": ("none", "gradients", "factors", "auto"),
    # The dtype in which these factors travel; None: their own.
    "reduce_dtype": (None, "bfloat16"),
    # Of sharded matrices, "in_place": the direction runs on the pieces and sends thin matrices; "dealt": whole matrices
    # go to owners, and U or its factors come back; "auto": what is cheaper by the dry run.
    "shard_compute": ("auto", "in_place", "dealt"),
    # "none": every replica keeps the state of all its matrices; "zero1": one replica keeps the state of each matrix.
    "shard_state": ("none", "zero1"),
}
# Common keys that belong to single groups, not to a whole optimizer.
OF_GROUPS = {"role", "reason", "view", "lr_factor", "rounding_steps"}
# Keys that decide where and how a step runs, or how it rounds weights. They are not loaded from checkpoints: the values
# that the optimizer was built with stay, and a checkpoint saved under one value loads under another.
DEPLOYMENT = (*CHOICES, "state_offload", "fused", "foreach", "capturable", "differentiable", "rounding")
# Keys that torch, its schedulers and its checkpoints put into groups.
FOREIGN = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
# OneCycleLR and CyclicLR write a momentum into one of CYCLED in groups of every rule, and its BOUNDS beside it.
CYCLED, BOUNDS = {"momentum", "betas"}, {"max_momentum", "base_momentum"}
# Arguments of a constructor that are not keys of groups.
ARGUMENTS = (
    "process_group",
    "drift_check",
    "kernels",
    "scalar",
    "scalar_lr",
    "scalar_weight_decay",
    "scalar_betas",
    "overrides",
)

# Our keys, and other words for them: those of torch.optim's AdamW and Muon, K. Jordan's and Moonlight's Muon,
# microsoft/dion, GaLore, timm and Megatron, and our own earlier ones. A word may stand for several keys: the first one
# that the rule reads is suggested.
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
# Similarity from which on a group's key counts as a typo of one of ours: "rank_fractoin" has 0.92, "name" at most 0.57.
SLIP = 0.75
# Types of option values by which a rule can be cached.
PLAIN = (bool, int, float, str, type(None))


def rule_keys() -> dict[str, dict[str, Any]]:
    """Return the keys of every rule with their defaults; read anew each time, because users may register rules."""
    return {name: rule.options() for name, rule in RULES.items()}


def all_keys() -> list[str]:
    """Return the keys that every completed group has."""
    return [*COMMON, *dict.fromkeys(key for keys in rule_keys().values() for key in keys if key not in COMMON)]


def rule_class(group: dict[str, Any]) -> RuleType:
    name = group.get("rule")
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown; choose one of {', '.join(map(repr, RULES))}")
    return RULES[name]


def group_rule(group: dict[str, Any]) -> Rule:
    """Return the frozen, validated rule that a group's values describe. Raises ValueError or TypeError."""
    rule = rule_class(group)
    defaults = rule.options()
    values = {key: group[key] for key in defaults if key in group}
    for key, value in values.items():
        free = isinstance(value, Tensor) and value.device.type == "cpu" and not value.ndim
        if free and not group.get("capturable"):
            values[key] = value.item()  # no device sync, and every kernel takes a number
        elif isinstance(value, list) and isinstance(defaults[key], tuple):
            values[key] = tuple(value)
        elif isinstance(defaults[key], float) and isinstance(value, Real) and not isinstance(value, (bool, float)):
            values[key] = float(value)  # momentum=0, or numpy's float32
    if any(type(value) not in PLAIN for value in values.values()):
        return rule(**values)
    return _same_rule(rule, tuple(defaults), tuple((key, type(value), value) for key, value in values.items()))


@lru_cache(maxsize=256)
def _same_rule(rule: RuleType, keys: tuple[str, ...], values: tuple[tuple[str, type, Any], ...]) -> Rule:
    """Return the rule of these values, cached, because a step needs it several times. The cache key contains the types,
    because True == 1, and ``keys``, because stages may be registered later."""
    return rule(**{key: value for key, _, value in values})


def plain(value: Any) -> Any:
    """Return a float for a number of numpy, as some schedules return, which ``torch.load(weights_only=True)`` refuses;
    return anything else as it is."""
    return float(value) if isinstance(value, Real) and type(value).__module__ != "builtins" else value


def check_options(given: dict[str, Any], beside: set[str] = OF_GROUPS) -> None:
    """Refuse keys that an optimizer is ``given`` for the groups of its rule and that nothing would read, whatever their
    values. ``beside``: common keys that are set elsewhere."""
    own = rule_class(given).options()
    for key in given:
        if key in own or (key in COMMON and (key not in beside or given[key] == COMMON[key])):
            continue  # hosts rebuild optimizers from `defaults`, which contain every common key
        if key in COMMON:
            raise ValueError(f"{key!r} is a key of single groups: put it into one, or into overrides of param_groups")
        if key in all_keys():
            raise ValueError(_not_read(key, given["rule"]))
        hint = _hint(key, own, [*own, *COMMON, *ARGUMENTS], 0.6) or f"{given['rule']!r} reads {', '.join(sorted(own))}"
        raise ValueError(f"unknown key {key!r}; {hint}")


def refuse_unread(rule: Rule, said: dict[str, Any]) -> None:
    """Refuse an option that was given (``said``) and that the rule does not read beside its other options. Defaults and
    0 pass, because hosts hand on defaults."""
    for key, why in rule.unread.items():
        if key in said and said[key] not in (0, default_of(key, said)):
            raise ValueError(f"{key}={said[key]!r} has no effect: {why}")


def check_keys(group: dict[str, Any]) -> None:
    """Refuse a key that this group's rule does not read, and a key that looks like a typo of, or another word for, one
    of ours: it would be silently ignored. Other keys belong to hosts and users."""
    own = rule_class(group).options()
    for key, value in group.items():
        if key in own or key in COMMON or key in FOREIGN or (key in CYCLED and group.keys() >= BOUNDS):
            continue
        if key not in all_keys():
            if hint := _hint(key, own, all_keys(), SLIP):
                raise ValueError(f"unknown key {key!r}; {hint}")
            continue
        default = default_of(key, group)  # may be in any group, because all groups are completed to the same keys
        if (tuple(value) if isinstance(value, list) and isinstance(default, tuple) else value) != default:
            raise ValueError(_not_read(key, group["rule"]))


def _hint(key: str, own: Iterable[str], known: Iterable[str], cutoff: float) -> str:
    """Suggest the key that a user may have meant, preferably one that the rule reads (``own``); "" if none is near."""
    words = [ours for ours, theirs in OTHER_WORDS.items() if key.lower() in theirs.split()]
    near = words or difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
    meant = [ours for ours in near if ours in own] or near
    return f"did you mean {meant[0]!r}?" if meant else ""


def _not_read(key: str, rule: str) -> str:
    readers = [name for name, keys in rule_keys().items() if key in keys]
    scalar = f"; for parameters that are no matrices, set scalar_{key}" if f"scalar_{key}" in ARGUMENTS else ""
    return (
        f"key {key!r} means nothing to rule {rule!r} (it belongs to {', '.join(map(repr, readers))}); remove it, or "
        f"put it into a group of that rule{scalar}"
    )


def made_up(group: int, index: int) -> str:
    """Return a name for a parameter that was given none."""
    return f"group {group}, parameter {index}"


def default_of(key: str, group: dict[str, Any]) -> Any:
    """Return the default of a key in a group: that of the group's rule, or of the first rule that has the key."""
    for rule in (rule_class(group), *RULES.values()):
        if key in (keys := rule.options()):
            return keys[key]
    return COMMON[key]


def complete(group: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the group with every key. Values that the optimizer was ``given`` apply to each group whose rule reads
    them. Only lr differs: a group of another rule has its rule's default, or `lr_factor` times the optimizer's lr if it
    sets that key. Raises ValueError or TypeError for a wrong key or value."""
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
    for key in all_keys():  # schedulers fill tensors in place, group by group, so no two groups may share one
        if isinstance(group[key], Tensor):
            group[key] = group[key].detach().clone()
    if bool(group["capturable"]) != bool(given.get("capturable")):
        raise ValueError(
            f"capturable={group['capturable']!r} in a group, but a step is captured as a whole: give capturable=True "
            f"to the optimizer, and leave it out of the groups"
        )
    refuse_unread(check_values(group), said)
    return group


def check_values(group: dict[str, Any]) -> Rule:
    """Return the rule of a group that has every key. Raises ValueError or TypeError for values that are invalid or do
    not go together."""
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
            f"reduce_dtype={group['reduce_dtype']!r} applies to factors, and replica_sync={group['replica_sync']!r} "
            f"exchanges none; choose replica_sync='factors' or 'auto', or leave reduce_dtype out"
        )
    _check_shard_state(group)
    switch("state_offload", group["state_offload"])
    rule = group_rule(group)
    if group["replica_sync"] == "factors" and group["state_dtype"] == EIGHT_BITS:
        raise ValueError(
            f"replica_sync='factors' does not go with state_dtype={EIGHT_BITS!r}: each replica then keeps a momentum "
            f"of its own, and the mean of momenta rounded to 8 bits is not the momentum; choose "
            f"replica_sync='gradients', or another state_dtype"
        )
    if group["replica_sync"] == "factors" and rule.matrices and not rule.factors:
        raise ValueError(
            f"replica_sync='factors' does not go with rule {group['rule']!r} and its stages, whose update needs every "
            f"entry of the averaged gradient, not only thin factors of it; choose replica_sync='gradients', or rule "
            f"'dion' without equilibrate"
        )
    return rule


def _check_shard_state(group: dict[str, Any]) -> None:
    if group["shard_state"] == "none":
        return
    sync = group["replica_sync"]
    if sync in ("factors", "auto"):
        raise ValueError(
            f"shard_state='zero1' does not go with replica_sync={sync!r}: replicas that exchange factors each keep the "
            f"momentum of their own gradients; choose replica_sync='none' or 'gradients', or leave shard_state out"
        )
    if group["replica_compute"] == "repeat":
        raise ValueError(
            "replica_compute='repeat' does not go with shard_state='zero1': a replica has no state to repeat the work "
            "of others with; leave one of the two out"
        )
