"""What every command that trains many runs of one kind is asked: `compare` and `sweep`.

May import ``orthoshard.lab.train``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orthoshard.lab.train.config import DataConfig, MachineConfig, ModelConfig, ScheduleConfig


@dataclass(frozen=True)
class ManyRuns:
    """The training run that all of them are, but for what is compared or searched, and what is kept of each."""

    preset: str = "default"
    """The training run: a preset of `orthoshard train`, or a TOML file; flags go on top. Its optimizer is left out."""
    validate_every: int = 25
    """Steps between validations."""
    validation_batches: int = 16
    """Batches of a validation; they are the same ones each time."""
    checkpoint_every: int = 100
    """Steps between checkpoints, for a run that is stopped; they go when the run is done. 0: none."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
