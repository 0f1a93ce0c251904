"""A comparison: its settings, its finished and missing runs, and the files that show it.

    folder/...                          see `folder`
    folder/table.md, compare.png        made from the runs, as results.json is

May import ``orthoshard.lab.compare``, ``orthoshard.lab.train`` and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orthoshard.lab.bench.files import write_text
from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.folder import SETTINGS, Folder
from orthoshard.lab.compare.grid import Grid, Spot, State, state
from orthoshard.lab.compare.job import Job, Outcome
from orthoshard.lab.compare.plot import plot
from orthoshard.lab.compare.rivals import Rival
from orthoshard.lab.compare.table import Row, markdown, rows
from orthoshard.lab.train.config import OptimizerConfig, RecordConfig, TrainConfig, from_dict, to_dict
from orthoshard.lab.train.errors import UserError, unknown


@dataclass(frozen=True)
class Comparison:
    """A comparison. ``base`` has the settings of all runs except optimizer and seed; ``digest`` is that of the data."""

    folder: Path
    base: TrainConfig
    rivals: tuple[Rival, ...]
    grid: Grid
    reference: str | None
    digest: str

    def check(self) -> None:
        """Check the settings. Raises ``UserError`` for impossible values."""
        grid = self.grid
        if grid.points < 1:
            raise UserError(f"--points is {grid.points}; give the learning rates a grid begins with, at least 1.")
        if grid.scalar_points < 1:
            raise UserError(f"--scalar-points is {grid.scalar_points}; give at least 1, which fixes --scalar-lr.")
        if grid.most < max(grid.points, grid.scalar_points):
            raise UserError(
                f"--most is {grid.most}; give at least as many as --points, {grid.points}, and --scalar-points, "
                f"{grid.scalar_points}."
            )
        if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds):
            raise UserError("--seeds has to name at least one seed, and none twice, such as --seeds 0 1 2.")
        for seed in grid.seeds:
            replace(self.base, seed=seed).check()
        for rival in self.rivals:
            for name in ("lr", "scalar_lr"):
                rate = getattr(rival.config, name)
                if rate is None or not (math.isfinite(rate) and rate > 0):
                    raise UserError(
                        f"the optimizer {rival.label} has {name} = {rate}; give a number above 0, such as 0.01."
                    )
            replace(self.base, optimizer=rival.config).check()

    def collect(self) -> dict[str, dict[Spot, Outcome]]:
        """Return the finished runs, by rival and spot. Raises ``UserError`` if a run used other data."""
        found: dict[str, dict[Spot, Outcome]] = {}
        for rival in self.rivals:
            mine = found[rival.label] = {}
            asked: set[Spot] = set()
            while fresh := [spot for spot in self._state(mine).missing if spot not in asked]:
                asked.update(fresh)  # finished runs decide which ones come next
                for spot in fresh:
                    run = Folder(self.folder).load(self._job(rival, spot), self.digest)
                    if run is not None:
                        mine[spot] = run
        return found

    @cached_property
    def _made(self) -> dict[tuple[str, Spot], Job]:
        return {}

    def _job(self, rival: Rival, spot: Spot) -> Job:
        """Return the job of a spot. Jobs are cached, because the name of the folder needs a digest."""
        key = (rival.label, spot)
        if key not in self._made:
            self._made[key] = jobs.make(rival, spot, self.base)
        return self._made[key]

    def _state(self, runs: Mapping[Spot, Outcome]) -> State:
        return state(self.grid, {spot: run.loss for spot, run in runs.items()})

    def states(self, found: Mapping[str, Mapping[Spot, Outcome]]) -> dict[str, State]:
        return {label: self._state(runs) for label, runs in found.items()}

    def wanted(self) -> list[Job]:
        """Return the runs that are missing now, in turns: one for each rival, then the next for each."""
        found = self.collect()
        queue: list[tuple[int, Job]] = []
        for rival in self.rivals:
            mine = found[rival.label]
            for turn, spot in enumerate(self._state(mine).missing, start=len(mine)):
                queue.append((turn, self._job(rival, spot)))
        return [job for _, job in sorted(queue, key=lambda entry: entry[0])]

    def settings(self) -> dict[str, Any]:
        return {
            "base": to_dict(self.base),
            "rivals": [{"label": rival.label, "config": to_dict(rival.config)} for rival in self.rivals],
            "sweep": asdict(self.grid),
            "reference": self.reference,
            "digest": self.digest,
        }

    def claimed(self) -> AbstractContextManager[Sequence[int]]:
        """Lock the folder, which must be new or hold a comparison that this one continues. More rivals, seeds or rates
        continue it; another model, text or schedule does not. Raises ``UserError``."""

        def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
            found = _made_of(values, self.folder)
            return {**comparable(found.base), "digest": found.digest}

        return Folder(self.folder).claimed(self.settings(), fixed)

    def report(self, about: Mapping[str, Any]) -> list[Row]:
        """Write the table, the plot and the JSON of everything, from the finished runs."""
        found = self.collect()
        states = self.states(found)
        made = rows(found, states, self.grid.seeds[0], self.reference)
        runs = [run for mine in found.values() for run in mine.values()]
        Folder(self.folder).write_results({**about, **self.settings()}, made, runs)
        write_text(self.folder / "table.md", markdown(made, self.reference, self.caption(runs)))
        draft = self.folder / ".compare.png"
        plot(made, found, self.grid.seeds[0], draft)
        draft.replace(self.folder / "compare.png")
        return made

    def caption(self, runs: Sequence[Outcome]) -> str:
        """Return what a reader of the table needs to know."""
        base, s = self.base, self.base.schedule
        tokens = s.batch * s.accumulate * base.model.context
        seeds = "one seed" if len(self.grid.seeds) == 1 else f"{len(self.grid.seeds)} seeds (mean ± half the range)"
        text = (
            f"{base.model.name} on {base.data.corpus}, {s.steps} steps of {tokens:,} tokens, {seeds}; validation loss "
            f"in nats a token. {_tuning(self.grid)}"
        )
        if self.reference is not None:
            text += f" Steps and seconds to {self.reference}'s best: within runs of this length, on a falling schedule."
        if runs:
            machine = runs[0].machine
            text += f" torch {runs[0].versions['torch']}, {machine['device']}, threads: {machine['threads']}."
        return text


def _tuning(grid: Grid) -> str:
    """Return a sentence on how the rates were found."""

    def one(points: int) -> str:
        return "given, not tuned" if points == 1 else f"the best of {points} or more"

    return (
        f"Each optimizer has two learning rates: lr, of matrices, {one(grid.points)}; at that lr then scalar lr, of "
        f"embeddings, heads, norms and biases, {one(grid.scalar_points)}. Grids are a factor of 2 apart, with more "
        "tried while the best lay on the edge."
    )


def read(folder: Path) -> Comparison:
    """Return the comparison in a folder. Raises ``UserError``."""
    return Folder(folder).read(lambda values: _made_of(values, folder))


def _made_of(values: Mapping[str, Any], folder: Path) -> Comparison:
    where, grid = str(folder / SETTINGS), values["sweep"]
    return Comparison(
        folder,
        from_dict(TrainConfig(), values["base"], where),
        tuple(Rival(r["label"], from_dict(OptimizerConfig(), r["config"], where)) for r in values["rivals"]),
        Grid(grid["points"], grid["most"], tuple(grid["seeds"]), grid.get("scalar_points", 1)),
        values["reference"],
        values["digest"],
    )


def find_reference(rivals: Sequence[Rival], label: str | None) -> str | None:
    """Return the label of the reference: the given one, or else the first AdamW. Raises ``UserError``."""
    if label is not None:
        if label not in [rival.label for rival in rivals]:
            raise unknown("optimizer for --reference", label, [rival.label for rival in rivals])
        return label
    return next((rival.label for rival in rivals if rival.config.name == "adamw"), None)


def comparable(base: TrainConfig) -> dict[str, Any]:
    """Return the settings that all runs of a comparison share, without those of speed and of saving."""
    kept = RecordConfig(validate_every=base.record.validate_every, validation_batches=base.record.validation_batches)
    machine = dataclasses.replace(base.machine, threads=0)
    return to_dict(dataclasses.replace(base, record=kept, machine=machine, optimizer=OptimizerConfig(), seed=0))
