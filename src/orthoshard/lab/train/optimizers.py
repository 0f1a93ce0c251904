"""The optimizer that the settings name, out of orthoshard's own; what is left out takes the library's default."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from torch import nn

from orthoshard import RuleOptimizer, param_groups
from orthoshard.lab.train.config import OptimizerConfig
from orthoshard.lab.train.errors import UserError, unknown
from orthoshard.params import scalar_share
from orthoshard.rules import OWN, RULES, RuleType

# Settings that are keys of a rule, and those of what it has beside it.
KEYS = ("rank_fraction", "rank_multiple_of", "momentum", "nesterov", "scale", "polar", "weight_decay")
BESIDE = ("scalar", "scalar_lr")


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, group: Any = None, replica_sync: str = "none"
) -> RuleOptimizer:
    """``group``: the processes that hold the same plain parameters, if any; or, with ``replica_sync``, the same
    parameters and gradients of their own.

    Raises ``UserError`` for a name, a value or a combination that cannot be.
    """
    rule = rule_of(config)
    for setting in (*KEYS, "scalar"):
        means = setting in rule.options() if setting in KEYS else rule.matrices
        if not means and getattr(config, setting) is not None:
            flag = setting.replace("_", "-")
            raise UserError(f"--{flag} means nothing to the optimizer {config.name}; leave it out.")
    scalars = [name for name, found in RULES.items() if not found.matrices]
    if config.scalar is not None and config.scalar not in scalars:
        raise unknown("scalar rule", config.scalar, scalars)
    options: dict[str, Any] = {name: value for name in KEYS if (value := getattr(config, name)) is not None}
    options |= _options(config.option)
    distributed: dict[str, Any] = {"process_group": group, "replica_sync": replica_sync}
    lr = rule.options()["lr"] if config.lr is None else config.lr
    try:
        if not rule.matrices:  # its options are of both groups
            rates = {"lr": lr, "scalar_lr": config.scalar_lr}
            return RuleOptimizer(model, rule=config.name, **rates, **distributed, **options)
        groups = param_groups(
            model,
            matrix=config.name,
            scalar=config.scalar or "adamw",
            lr=lr,
            scalar_lr=config.scalar_lr,
            **options,
        )
        return RuleOptimizer(groups, rule=config.name, lr=lr, **distributed)
    except (ValueError, TypeError) as error:  # the library's sentence already says what to do
        raise UserError(str(error)) from error


def choices() -> dict[str, RuleType]:
    """The rules that an optimizer can be named after."""
    return {name: rule for name, rule in RULES.items() if rule.matrices or name == "adamw"}


def rule_of(config: OptimizerConfig) -> RuleType:
    """The rule of the optimizer's name, its plugin imported. Raises ``UserError``."""
    if config.plugin:
        import_plugin(config.plugin)
    known = choices()
    if config.name not in known:
        raise unknown("optimizer", config.name, known)
    return known[config.name]


def default_lr(name: str) -> float:
    """Of an optimizer whose learning rate is left open: its rule's own default."""
    return RULES[name].options()["lr"]


def default_scalar_lr(name: str) -> float:
    """Beside that: AdamW's share of it, where the rule is one of matrices."""
    return default_lr(name) * (scalar_share("adamw") if RULES[name].matrices else 1.0)


def plugged_in() -> list[str]:
    """The rules of others: those that a plugin has registered."""
    return [name for name in RULES if name not in OWN]


def import_plugin(plugin: str) -> None:
    """As `python -m` would: modules of the current folder are found too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(plugin)
    except ImportError as error:
        raise UserError(f"--plugin {plugin} cannot be imported ({error}); give a module's name.") from error


def _options(given: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` pairs; values are read as JSON where they are that, and are words otherwise."""
    found: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r} is no key=value, such as tail_weight=0.5.")
        if key in KEYS or key in BESIDE or key == "lr":
            raise UserError(f"--option {pair!r} has a flag of its own; give --{key.replace('_', '-')} {value}.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
