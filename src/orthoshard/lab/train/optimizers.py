"""Building the optimizer from the settings. Settings left out take the library's defaults."""

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

# Settings that are keys of the matrix rule, and settings of the scalar rule beside it.
KEYS = ("rank_fraction", "rank_multiple_of", "momentum", "nesterov", "scale", "polar", "weight_decay")
BESIDE = ("scalar", "scalar_lr")


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, group: Any = None, replica_sync: str = "none"
) -> RuleOptimizer:
    """Return the optimizer of ``model``. Raises ``UserError`` for an unknown name, a bad value or a bad combination.

    ``group`` holds the processes that have the same plain parameters, if any. With ``replica_sync`` each of them has a
    gradient of its own.
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
        if not rule.matrices:  # its options apply to all groups
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
    except (ValueError, TypeError) as error:  # the library's message already says what to do
        raise UserError(str(error)) from error


def choices() -> dict[str, RuleType]:
    """Return the rules that --optimizer accepts, by name."""
    return {name: rule for name, rule in RULES.items() if rule.matrices or name == "adamw"}


def rule_of(config: OptimizerConfig) -> RuleType:
    """Import the plugin, if any, and return the rule that ``config`` names. Raises ``UserError``."""
    if config.plugin:
        import_plugin(config.plugin)
    known = choices()
    if config.name not in known:
        raise unknown("optimizer", config.name, known)
    return known[config.name]


def default_lr(name: str) -> float:
    """Return the learning rate of an optimizer for which none is given: the default of its rule."""
    return RULES[name].options()["lr"]


def default_scalar_lr(name: str) -> float:
    """Return the learning rate of the scalar rule beside `default_lr`: with a matrix rule, AdamW's share of it."""
    return default_lr(name) * (scalar_share("adamw") if RULES[name].matrices else 1.0)


def plugged_in() -> list[str]:
    """Return the names of rules that plugins have registered."""
    return [name for name in RULES if name not in OWN]


def import_plugin(plugin: str) -> None:
    """Import the module ``plugin``; as with `python -m`, also from the current folder. Raises ``UserError``."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(plugin)
    except ImportError as error:
        raise UserError(f"--plugin {plugin} cannot be imported ({error}); give a module's name.") from error


def _options(given: tuple[str, ...]) -> dict[str, Any]:
    """Return `key=value` pairs as a dict. Values that are not JSON are strings. Raises ``UserError``."""
    found: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r} is not of the form key=value, such as tail_weight=0.5.")
        if key in KEYS or key in BESIDE or key == "lr":
            raise UserError(f"--option {pair!r} has a flag of its own; give --{key.replace('_', '-')} {value}.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
