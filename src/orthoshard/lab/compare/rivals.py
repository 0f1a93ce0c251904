"""The optimizers that are compared, as data: a new one is one line here, or one table in a TOML file.

    [[rival]]                   every other key is one of `orthoshard train`'s settings of an optimizer
    label = "dion-1/4"
    name = "dion"
    rank_fraction = 0.25
    lr = 0.01                   the middle of its first grid: of its matrices
    scalar_lr = 0.012           the middle of its second: of embeddings, heads, norms and biases

May import ``orthoshard.lab.train`` and `orthoshard.lab.compare.grid`.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from orthoshard.lab.compare.grid import learning_rate
from orthoshard.lab.train.config import OptimizerConfig, from_dict
from orthoshard.lab.train.errors import UserError, unknown
from orthoshard.lab.train.optimizers import choices, rule_of


@dataclass(frozen=True, slots=True)
class Rival:
    """One optimizer, with its name in tables. Its rates are the middles of its two grids."""

    label: str
    config: OptimizerConfig

    def at(self, k: int, j: int = 0) -> OptimizerConfig:
        """Return its settings at lr x 2^k and scalar_lr x 2^j."""
        lr, scalar_lr = self.config.lr, self.config.scalar_lr
        assert lr is not None
        scalar_lr = None if scalar_lr is None else learning_rate(scalar_lr, j)
        return replace(self.config, lr=learning_rate(lr, k), scalar_lr=scalar_lr)


# One scale convention for all matrix rules, so that what differs is the rule. The middle of a grid matters little: a
# best learning rate on its edge extends it. These were the best of the last comparison: few have to be extended.
def matrices(name: str, lr: float, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, lr=lr, scale="spectral", weight_decay=0.01, **options)


DEFAULT = (
    Rival("adamw", OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.01)),
    Rival("muon", matrices("muon", 0.02, nesterov=True)),
    Rival("muon-no-nesterov", matrices("muon", 0.02, nesterov=False)),
    Rival("dion-1", matrices("dion", 0.02, rank_fraction=1.0)),
    Rival("dion-1/4", matrices("dion", 0.01, rank_fraction=1 / 4)),
    Rival("dion-1/16", matrices("dion", 0.01, rank_fraction=1 / 16)),
    Rival("tail-1/4", matrices("dion_tail", 0.02, rank_fraction=1 / 4)),
    Rival("tail-1/16", matrices("dion_tail", 0.01, rank_fraction=1 / 16)),
)


def load(path: Path) -> tuple[Rival, ...]:
    """Return the rivals in a TOML file. Raises ``UserError``."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"the optimizers in {path} cannot be read ({error}); give a TOML file.") from error
    for key in document:
        if key != "rival":
            raise UserError(f"in {path}: {unknown('key', key, ['rival'])}")
    tables: object = document.get("rival")
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path} names no optimizer; begin each with a line [[rival]], then label, name and lr.")
    return tuple(_rival(table, f"{path}, rival {k}") for k, table in enumerate(cast("list[object]", tables), start=1))


def _rival(table: object, source: str) -> Rival:
    if not isinstance(table, Mapping):
        raise UserError(f"in {source}: a rival is a table of settings, not {table!r}.")
    values = dict(cast("Mapping[str, Any]", table))
    label = values.pop("label", None)
    if not isinstance(label, str) or not label.strip():
        raise UserError(f'in {source}: give it a label, such as label = "dion-1/4".')
    if "name" not in values:
        raise UserError(f"in {source}: give the optimizer's name: {', '.join(choices())}.")
    config = from_dict(OptimizerConfig(), values, source)
    if config.lr is None:
        try:
            config = replace(config, lr=rule_of(config).options()["lr"])
        except UserError as error:
            raise UserError(f"in {source}: {error}") from error
    return Rival(label.strip(), config)


def choose(rivals: Sequence[Rival], patterns: Sequence[str]) -> tuple[Rival, ...]:
    """Return the rivals whose label matches a pattern (``dion-1/4``, ``muon*``), or all if no pattern is given. Raises
    ``UserError``."""
    labels = [rival.label for rival in rivals]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two optimizers are called {label!r}; give each its own label.")
    for pattern in patterns:
        if not fnmatch.filter(labels, pattern):
            raise unknown("optimizer to compare", pattern, labels)
    return tuple(r for r in rivals if not patterns or any(fnmatch.fnmatchcase(r.label, p) for p in patterns))
