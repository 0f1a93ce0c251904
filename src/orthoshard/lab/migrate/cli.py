"""``orthoshard migrate``: the flags, and the text of `advice`. May import tyro and ``orthoshard``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from orthoshard.grouping import claims
from orthoshard.lab.migrate.advice import Adamw, Target, advise
from orthoshard.lab.models import describe
from orthoshard.lab.train.config import SHARE


@dataclass(frozen=True)
class MigrateConfig:
    """From the settings of a working AdamW run to groups for Dion or Muon whose updates are of the same size.

    Prints the conventions for learning rates side by side, what stays under AdamW and why, and Python to copy."""

    lr: float = 3e-4
    """AdamW's peak learning rate."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    model: str = "tiny"
    """A size of `orthoshard train`, a published model (`orthoshard explain --list`), or a Hugging Face
    `config.json` or a folder that has one."""
    optimizer: Literal["dion", "dion_tail", "muon"] = "dion"
    """Where to."""
    rank_fraction: Annotated[float, SHARE] | None = None
    """Dion, DionTail: such as `1/16`; by default the rule's own 1/4."""
    scale: Literal["rms", "spectral", "original"] = "rms"
    """The convention of the code: `rms` keeps AdamW's learning rate for every shape."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0, or 2 where something has to be put right first."""
    config = tyro.cli(MigrateConfig, prog="orthoshard migrate", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        print(run(config))
    except ValueError as error:
        print(f"orthoshard migrate: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: MigrateConfig) -> str:
    """The text. Raises ValueError."""
    for name, value in (("--lr", config.lr), ("--weight-decay", config.weight_decay)):
        least = "above 0" if name == "--lr" else "of at least 0"
        if not math.isfinite(value) or value < 0 or (name == "--lr" and value == 0):
            raise ValueError(f"{name} is {value}; give a finite number {least}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"--betas are {config.betas}; give two numbers from 0 up to, not including, 1")
    target = Target(config.optimizer, config.scale, _rank(config))
    model = describe(config.model).on_meta()
    return advise(config.model, list(claims(model)), Adamw(config.lr, config.weight_decay, config.betas), target)


def _rank(config: MigrateConfig) -> float | None:
    rank = config.rank_fraction
    if rank is not None and config.optimizer == "muon":
        raise ValueError("Muon has no ranks; leave --rank-fraction out")
    if rank is not None and not 0 < rank <= 1:
        raise ValueError(f"--rank-fraction is {rank:g}; give a share above 0, at most 1, such as 1/16")
    return rank
