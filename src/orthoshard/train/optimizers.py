"""The optimizer that the settings name, out of orthoshard's own; what is left out takes the library's default."""

from __future__ import annotations

from typing import Any

from torch import nn

from orthoshard import Dion, Muon, RuleOptimizer, param_groups
from orthoshard.train.config import OptimizerConfig
from orthoshard.train.errors import UserError, unknown

# Peak learning rates where none is given, and the settings that mean something for each optimizer.
LR = {"dion": 0.01, "muon": 0.02, "adamw": 3e-3}
SCALAR_LR = 3e-3
SETTINGS = {
    "dion": ("rank_fraction", "rank_multiple_of", "momentum", "scale", "weight_decay"),
    "muon": ("momentum", "nesterov", "scale", "polar", "weight_decay"),
    "adamw": ("weight_decay",),
}
SCALAR_RULES = ("adamw", "lion")


def build_optimizer(model: nn.Module, config: OptimizerConfig, group: Any = None) -> RuleOptimizer:
    """``group``: the processes that hold the same plain parameters, if any.

    Raises ``UserError`` for a name, a value or a combination that cannot be.
    """
    if config.name not in SETTINGS:
        raise unknown("optimizer", config.name, SETTINGS)
    matrices = config.name != "adamw"
    known = {*SETTINGS[config.name], *(("scalar", "scalar_lr") if matrices else ())}
    every = (
        "rank_fraction",
        "rank_multiple_of",
        "momentum",
        "nesterov",
        "scale",
        "polar",
        "weight_decay",
        "scalar",
        "scalar_lr",
    )
    for setting in every:
        if setting not in known and getattr(config, setting) is not None:
            flag = setting.replace("_", "-")
            raise UserError(f"--{flag} means nothing to the optimizer {config.name}; leave it out.")
    if config.scalar is not None and config.scalar not in SCALAR_RULES:
        raise unknown("scalar rule", config.scalar, SCALAR_RULES)
    lr = LR[config.name] if config.lr is None else config.lr
    options: dict[str, Any] = {
        name: value for name in SETTINGS[config.name] if (value := getattr(config, name)) is not None
    }
    try:
        if not matrices:
            return RuleOptimizer(model, rule="adamw", lr=lr, process_group=group, **options)
        groups = param_groups(
            model,
            matrix=config.name,
            scalar=config.scalar or "adamw",
            lr=lr,
            scalar_lr=SCALAR_LR if config.scalar_lr is None else config.scalar_lr,
            **options,
        )
        return (Dion if config.name == "dion" else Muon)(groups, lr=lr, process_group=group)
    except (ValueError, TypeError) as error:  # the library's sentence already says what to do
        raise UserError(str(error)) from error
