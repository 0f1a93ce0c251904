"""One run of a comparison: rival, learning rates and seed; its settings, its folder, and its record.

    folder/job.json         the settings, written before the run starts
    folder/run.jsonl        the record that `orthoshard train` writes of every run
    folder/result.json      the values that tables need, written last: a run with this file is done

May import ``orthoshard.lab.train`` and ``orthoshard.lab.bench.files``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orthoshard.lab.bench.files import write_json
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.rivals import Rival
from orthoshard.lab.train import record
from orthoshard.lab.train.config import TrainConfig, to_dict
from orthoshard.lab.train.record import Event

RESULT = "result.json"
SETTINGS = "job.json"
# Recording does not change what a run computes. Folders are named as if each run recorded these, the defaults at the
# time of the first folders: under other names, runs that are already on disk would not be found.
RECORD = {
    "validate_every": 50,
    "validation_batches": 16,
    "checkpoint_every": 100,
    "keep": 2,
    "tensorboard": False,
    "sample_tokens": 160,
    "prompt": "",
    "temperature": 0.8,
}


@dataclass(frozen=True)
class Job:
    """One run. ``config`` has all of its settings, including learning rates and seed."""

    label: str
    spot: Spot
    config: TrainConfig

    @property
    def lr(self) -> float:
        assert self.config.optimizer.lr is not None
        return self.config.optimizer.lr

    @property
    def scalar_lr(self) -> float | None:
        return self.config.optimizer.scalar_lr

    @property
    def rates(self) -> str:
        """The rates as text for one line."""
        return f"lr {self.lr:.3g}" + ("" if self.scalar_lr is None else f", scalar lr {self.scalar_lr:.3g}")

    @cached_property
    def folder(self) -> str:
        """A readable name, different for different settings."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.label).strip("-.") or "rival"
        machine = replace(self.config.machine, threads=0)  # how fast, not what
        same = to_dict(replace(self.config, machine=machine)) | {"record": RECORD}
        digest = hashlib.sha256(json.dumps([self.label, same], sort_keys=True).encode()).hexdigest()
        return f"{name}-lr{self.lr:.6g}-seed{self.spot.seed}-{digest[:8]}"

    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "spot": list(self.spot), "config": to_dict(self.config)}


def make(rival: Rival, spot: Spot, base: TrainConfig) -> Job:
    return Job(rival.label, spot, replace(base, optimizer=rival.at(spot.k, spot.j), seed=spot.seed))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. Losses are in nats a token; a validation that was not finite is infinite."""

    label: str
    lr: float
    k: int
    seed: int
    status: str
    """`finished` or `diverged`."""
    steps: int
    validations: list[tuple[int, float]]
    train: list[tuple[int, float]]
    elapsed: list[float]
    """elapsed[s]: seconds of the first s steps, without validation and checkpoints; elapsed[0] is 0."""
    optimizer_ms: float | None
    """Median time of one step of the optimizer."""
    step_ms: float | None
    """Median time of a whole step."""
    state_bytes: int | None
    wall_seconds: float
    digest: str
    """Digest of the data."""
    machine: dict[str, Any]
    versions: dict[str, Any]
    scalar_lr: float | None = None
    """Rate of embeddings, heads, norms and biases; None in runs from before there were two rates."""
    j: int = 0

    @property
    def loss(self) -> float:
        """The best validation loss after the first step; infinite for a run that diverged."""
        if self.status != "finished":
            return math.inf
        return min((loss for step, loss in self.validations if step > 0), default=math.inf)


def outcome(job: Job, status: str, events: Sequence[Event], wall_seconds: float) -> Outcome:
    """Return the outcome of a run, from its record."""
    head = next(event for event in events if event["kind"] == "run")
    steps = [event for event in events if event["kind"] == "step"]
    validations = record.validations(events)
    last = next((event for event in reversed(events) if event["kind"] == "finished"), {})
    if status == "finished" and not all(math.isfinite(loss) for _, loss in validations[-1:]):
        status = "diverged"
    elapsed = [0.0]
    for event in steps:
        elapsed.append(elapsed[-1] + event["seconds"])
    return Outcome(
        job.label,
        job.lr,
        job.spot.k,
        job.spot.seed,
        status=status,
        steps=job.config.schedule.steps,
        validations=validations,
        train=[(event["step"], math.inf if event["loss"] is None else event["loss"]) for event in steps],
        elapsed=elapsed,
        optimizer_ms=_median_ms([event["optimizer_seconds"] for event in steps]),
        step_ms=_median_ms([event["seconds"] for event in steps]),
        state_bytes=last.get("state_bytes"),
        wall_seconds=wall_seconds,
        digest=head["data"]["digest"],
        machine=head["machine"],
        versions=head["versions"],
        scalar_lr=job.scalar_lr,
        j=job.spot.j,
    )


def _median_ms(seconds: list[float]) -> float | None:
    later = seconds[1:] or seconds  # the first step makes the state
    return statistics.median(later) * 1e3 if later else None


def save(path: Path, found: Outcome) -> None:
    write_json(path, to_json(found), indent=None)


def to_json(found: Outcome) -> dict[str, Any]:
    """Return the outcome for JSON, with null for numbers that are not finite."""
    return _nulls(asdict(found))


def load(path: Path) -> Outcome | None:
    """Return the outcome in a file; None if there is no file, or none that this version can read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("validations", "train"):
            values[key] = [(int(step), math.inf if loss is None else float(loss)) for step, loss in values[key]]
        return Outcome(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(item) for item in value]
    return value
