"""What grids and searches share: the settings of their runs, the flags for these, and checks.

May import ``orthoshard.lab``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from orthoshard.lab.train.cli import value_of
from orthoshard.lab.train.config import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    OptimizerConfig,
    RecordConfig,
    ScheduleConfig,
    TrainConfig,
)
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.presets import load_preset
from orthoshard.lab.verb import read_flags


@dataclass(frozen=True)
class ManyRuns:
    """Settings of all runs, except those that are compared or searched."""

    preset: str = "default"
    """The training run: a preset of `orthoshard train`, or a TOML file; flags override it. Its optimizer is ignored."""
    validate_every: int = 25
    """Steps between validations."""
    validation_batches: int = 16
    """Batches of a validation, the same ones each time."""
    checkpoint_every: int = 100
    """Steps between checkpoints, from which a stopped run continues; they are deleted when the run is done. 0: none."""
    jobs: int = 1
    """Runs at the same time. They share the cores, so compare times only between runs with the same --jobs."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def base(self, seed: int) -> TrainConfig:
        """Return the settings of every run, except the optimizer. Runs at the same time divide the cores among them."""
        if self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}; give the runs at the same time, at least 1.")
        machine = self.machine
        if self.jobs > 1 and not machine.threads:
            machine = dataclasses.replace(machine, threads=max(1, (os.cpu_count() or 1) // self.jobs))
        kept = RecordConfig(
            validate_every=self.validate_every,
            validation_batches=self.validation_batches,
            checkpoint_every=self.checkpoint_every,
            keep=1,
            sample_tokens=0,
        )
        return TrainConfig(self.data, self.model, OptimizerConfig(), self.schedule, kept, machine, seed=seed)


Runs = TypeVar("Runs", bound=ManyRuns)


def parse(kind: type[Runs], prog: str, arguments: Sequence[str]) -> Runs:
    """Return the command: the flags, on top of the preset that they name."""
    preset = load_preset(value_of("--preset", arguments) or "default")
    base = kind(data=preset.data, model=preset.model, schedule=preset.schedule, machine=preset.machine)
    return read_flags(kind, prog, arguments, base)


def try_out(base: TrainConfig, optimizers: Mapping[str, OptimizerConfig]) -> str:
    """Prepare the data and build every optimizer once, so that mistakes show before the first run. Return the digest of
    the data. Raises ``UserError``."""
    from orthoshard.lab.train.data import prepare
    from orthoshard.lab.train.machine import device_of
    from orthoshard.lab.train.model import build_model, own_tokenizer
    from orthoshard.lab.train.optimizers import build_optimizer

    device_of(base.machine)
    data = prepare(base.data, own_tokenizer(base.model))
    model = build_model(base.model, data.vocabulary, base.seed)
    for label, config in optimizers.items():
        try:
            build_optimizer(model, config)
        except UserError as error:
            raise UserError(f"the optimizer {label}: {error}") from error
    return data.digest
