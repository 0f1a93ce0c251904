"""The space of a search: for each optimizer, ranges of its settings, and how a trial draws from them.

    lr             log-uniform, of matrices
    scalar_lr      log-uniform, of embeddings, heads, norms and biases
    rank_fraction  powers of two, because a rank has to fit hardware, and a heat map rows
    momentum       1 - momentum log-uniform: 0.9 and 0.99 are as far apart as 0.99 and 0.999
    weight_decay   log-uniform

A range of one value fixes the setting. Parameters are named ``dion.lr`` and so on: what is best for one optimizer says
nothing of another's. May import ``orthoshard.rules``, ``orthoshard.lab.train`` and optuna.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orthoshard.lab.train.config import OptimizerConfig
from orthoshard.lab.train.errors import UserError, unknown
from orthoshard.lab.train.optimizers import default_lr, default_scalar_lr
from orthoshard.rules import RULES

Range = tuple[float, ...]  # (value,) or (low, high)

LR_SPAN = 8.0  # the learning rate is searched from so many times less than the default to so many times more
# Ranges where none is given; the defaults of the rules lie inside.
RANK_FRACTION: Range = (1 / 16, 1.0)
MOMENTUM: Range = (0.8, 0.99)
WEIGHT_DECAY: Range = (0.001, 0.1)
SCALAR_RATES: Range = (0.0015, 0.048)


class Suggests(Protocol):
    """The methods of a trial that are needed; a trial of optuna has them."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: tuple[str, ...]) -> Any: ...


@dataclass(frozen=True)
class Space:
    """Optimizers and ranges. An empty ``lr`` means a range around the default of each optimizer."""

    optimizers: tuple[str, ...]
    lr: Range = ()
    rank_fraction: Range = RANK_FRACTION
    momentum: Range = MOMENTUM
    weight_decay: Range = WEIGHT_DECAY
    scalar_lr: Range = SCALAR_RATES

    def check(self) -> None:
        """Check the space. Raises ``UserError`` for an impossible range or optimizer."""
        known = {name: rule for name, rule in RULES.items() if rule.matrices or name == "adamw"}
        if not self.optimizers or len(set(self.optimizers)) < len(self.optimizers):
            raise UserError("--optimizers has to name at least one optimizer, and none twice, such as dion muon.")
        for name in self.optimizers:
            if name not in known:
                raise unknown("optimizer", name, known)
        limits: dict[str, tuple[Callable[[float], bool], str]] = {
            "lr": (lambda value: value > 0, "above 0"),
            "scalar-lr": (lambda value: value > 0, "above 0"),
            "rank-fraction": (lambda value: 0 < value <= 1, "above 0, at most 1"),
            "momentum": (lambda value: 0 <= value < 1, "from 0 up to, not including, 1"),
            "weight-decay": (lambda value: value > 0 or (value == 0 and self.weight_decay == (0,)), "above 0; or 0"),
        }
        for flag, (sound, words) in limits.items():
            values: Range = getattr(self, flag.replace("-", "_"))
            count = 0 if flag == "lr" else 1
            whole = count <= len(values) <= 2 and all(math.isfinite(value) and sound(value) for value in values)
            if not whole or list(values) != sorted(values):
                given = " ".join(f"{value:g}" for value in values)
                raise UserError(f"--{flag} {given}: give one value, or the lowest and the highest, each {words}.")
        if len(self.rank_fraction) == 2 and not _exponents(self.rank_fraction):
            raise UserError(
                f"--rank-fraction {self.rank_fraction[0]:g} {self.rank_fraction[1]:g} has no power of two inside, and "
                "a range is searched by these; give a wider one, or one value."
            )

    def draw(self, trial: Suggests) -> OptimizerConfig:
        """Return the settings that a trial has drawn, or draws now."""
        names = self.optimizers
        name = names[0] if len(names) == 1 else str(trial.suggest_categorical("optimizer", names))
        keys = RULES[name].options()

        def one(key: str, values: Range) -> float | None:
            if key not in keys and key != "scalar_lr":
                return None
            if len(values) == 1:
                return values[0]
            if key == "rank_fraction":
                exponents = _exponents(values)
                return 2.0 ** trial.suggest_int(f"{name}.rank_log2", exponents[0], exponents[-1])
            if key == "momentum":
                return _rounded(1 - trial.suggest_float(f"{name}.1-momentum", 1 - values[1], 1 - values[0], log=True))
            return _rounded(trial.suggest_float(f"{name}.{key}", values[0], values[1], log=True))

        return OptimizerConfig(
            name=name,
            lr=one("lr", self.lr_of(name)),
            rank_fraction=one("rank_fraction", self.rank_fraction),
            momentum=one("momentum", self.momentum),
            weight_decay=one("weight_decay", self.weight_decay),
            scalar_lr=one("scalar_lr", self.scalar_lr),
        )

    def lr_of(self, name: str) -> Range:
        return self.lr or (default_lr(name) / LR_SPAN, default_lr(name) * LR_SPAN)

    def defaults(self, name: str) -> dict[str, Any]:
        """Return the defaults of an optimizer as parameters of a trial, moved into the ranges: the search has to beat
        them."""
        asked = _Asked(name)
        self.draw(asked)
        return asked.found

    def default(self, name: str) -> OptimizerConfig:
        """Return the same as settings."""
        return self.draw(_Asked(name))


class _Asked:
    """A stand-in for a trial, which draws the defaults of an optimizer and notes their names."""

    def __init__(self, optimizer: str) -> None:
        self.optimizer = optimizer
        self.given = {**RULES[optimizer].options(), "scalar_lr": default_scalar_lr(optimizer)}
        self.found: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        key = name.partition(".")[2]
        value = 1 - self.given["momentum"] if key == "1-momentum" else self.given[key]
        self.found[name] = min(max(value, low), high)
        return self.found[name]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.found[name] = min(max(round(math.log2(self.given["rank_fraction"])), low), high)
        return self.found[name]

    def suggest_categorical(self, name: str, choices: tuple[str, ...]) -> Any:
        self.found[name] = self.optimizer
        return self.optimizer


def _rounded(value: float) -> float:
    """Round to four digits, so that a run can be repeated from what is printed."""
    return float(f"{value:.4g}")


def _exponents(values: Range) -> range:
    """Return the exponents of the powers of two in a range."""
    low, high = (math.log2(value) for value in values)
    return range(math.ceil(low), math.floor(high) + 1)
