"""The contents of a comparison's folder, ready for figures. Every file is checked, and a damaged one is named.

May import ``orthoshard.lab.compare`` and ``orthoshard.lab.train``.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.comparison import Comparison
from orthoshard.lab.compare.folder import RUNS, Folder
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.job import Outcome
from orthoshard.lab.compare.table import Row, rows
from orthoshard.lab.train import record
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.record import Event


@dataclass(frozen=True)
class Results:
    """Results for the chosen rivals: ``rows`` as in the table of the comparison, and ``runs`` by rival and spot."""

    name: str
    comparison: Comparison
    rows: tuple[Row, ...]
    runs: Mapping[str, Mapping[Spot, Outcome]]

    @property
    def complete(self) -> bool:
        return all(row.status != "running" for row in self.rows)

    def best(self, label: str) -> list[Outcome]:
        """Return the runs at the best learning rates of a rival that did not diverge, by seed."""
        row = next(row for row in self.rows if row.label == label)
        rates = (row.lr, row.scalar_lr)
        found = [
            run for run in self.runs[label].values() if (run.lr, run.scalar_lr) == rates and math.isfinite(run.loss)
        ]
        return sorted(found, key=lambda run: run.seed)

    def events(self, run: Outcome) -> list[Event]:
        """Return the record of one of the runs. Raises ``UserError`` if it is damaged."""
        rival = next(rival for rival in self.comparison.rivals if rival.label == run.label)
        spot = next(spot for spot, each in self.runs[run.label].items() if each is run)
        return record.read(Folder(self.comparison.folder).run(jobs.make(rival, spot, self.comparison.base)))

    def choose(self, patterns: Sequence[str]) -> Results:
        """Return the results of the rivals whose labels match a pattern, or of all if there is no pattern."""
        if not patterns:
            return self
        kept = [row for row in self.rows if any(fnmatch.fnmatchcase(row.label, pattern) for pattern in patterns)]
        runs = {row.label: self.runs[row.label] for row in kept}
        return Results(self.name, self.comparison, tuple(kept), runs)

    def about(self) -> dict[str, Any]:
        """Return what was run, for the file of a figure."""
        settings = self.comparison.settings()
        runs = [run for mine in self.runs.values() for run in mine.values()]
        return {
            "base": settings["base"],
            "sweep": settings["sweep"],
            "rivals": [rival for rival in settings["rivals"] if rival["label"] in self.runs],
            "complete": self.complete,
            "runs": len(runs),
            "machine": runs[0].machine if runs else None,
            "versions": runs[0].versions if runs else None,
        }


def gather(name: str, comparison: Comparison, reference: str | None = None) -> Results:
    """Return the results of a comparison. Raises ``UserError`` for a damaged run file."""
    undamaged(comparison.folder)
    runs = comparison.collect()
    states = comparison.states(runs)
    mark = reference if reference in runs else comparison.reference
    return Results(name, comparison, tuple(rows(runs, states, comparison.grid.seeds[0], mark)), runs)


def undamaged(folder: Path) -> None:
    """Check the files of finished runs. Raises ``UserError`` for a damaged one. A missing run is no damage: it will be
    run."""
    for path in sorted((folder / RUNS).glob(f"*/{jobs.RESULT}")):
        why = _damage(path)
        if why:
            raise UserError(f"the run file {path} is damaged ({why}); delete it, and the run is made again.")


def _damage(path: Path) -> str | None:
    found = jobs.load(path)
    if found is None:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return str(error)
        return "it is not the record of a run"
    numbers: list[object] = [found.lr, found.wall_seconds, *found.elapsed, *(loss for _, loss in found.validations)]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return "a number in it is none"
    if found.status not in ("finished", "diverged") or not found.lr > 0:
        return f"status {found.status!r}, learning rate {found.lr}"
    if found.status == "finished" and not (found.validations and len(found.elapsed) == found.steps + 1):
        return f"{len(found.elapsed) - 1} of {found.steps} steps"
    return None


def parameters(results: Results) -> int:
    """Return the number of parameters of the model, from the record of a run, or counted if there is none."""
    base = results.comparison.base
    for path in sorted((results.comparison.folder / RUNS).glob(f"*/{record.NAME}")):
        for event in record.read(path.parent)[:1]:
            return int(event["parameters"])
    from orthoshard.lab.train.model import build_model

    return sum(p.numel() for p in build_model(base.model, base.data.vocabulary, 0).parameters())
