"""Run the comparisons of a study one after the other, with the time left for all of them.

Each is a folder of `orthoshard compare`, made by the same code: finished runs are not run again, and a run that was
stopped continues from its checkpoint. May import ``orthoshard.lab.compare``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from orthoshard.lab.compare import cli as compare
from orthoshard.lab.compare.comparison import Comparison
from orthoshard.lab.compare.display import Clock, display
from orthoshard.lab.compare.folder import RUNS
from orthoshard.lab.compare.grid import at_least_left
from orthoshard.lab.compare.pool import Active, Start, run_all
from orthoshard.lab.compare.study.file import Planned
from orthoshard.lab.compare.study.results import undamaged
from orthoshard.lab.train.errors import UserError


def prepare(planned: Planned, out: Path, jobs: int, threads: int) -> Comparison:
    """Return the comparison, checked and with its data ready; nothing is run. Raises ``UserError``."""
    flags = [*planned.flags, "--out", str(out / planned.name), "--jobs", str(jobs)]
    flags += ["--threads", str(threads)] if threads else []
    flags += ["--optimizers", str(planned.rivals)] if planned.rivals else []
    try:
        comparison = compare.prepare(compare.parse(flags))
    except SystemExit as error:
        raise UserError(f"the flags of the comparison {planned.name} are not those of `orthoshard compare`.") from error
    except UserError as error:
        raise UserError(f"the comparison {planned.name}: {error}") from error
    undamaged(comparison.folder)
    record = replace(comparison.base.record, diagnostics=planned.diagnostics)
    return replace(comparison, base=replace(comparison.base, record=record))


class Ledger:
    """Keeps how much of each comparison is done, and how long the rest takes."""

    def __init__(self, comparisons: Mapping[str, Comparison], minutes: Mapping[str, float | None]) -> None:
        self.comparisons = comparisons
        self.guesses = {name: guess and 60.0 * guess for name, guess in minutes.items()}
        self.done: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}
        for name in comparisons:
            self.look(name)

    def look(self, name: str) -> None:
        """Count the runs of a comparison again."""
        comparison = self.comparisons[name]
        found = comparison.collect()
        self.done[name] = sum(len(mine) for mine in found.values())
        self.left[name] = at_least_left(list(comparison.states(found).values()))
        self.seconds[name] = [run.wall_seconds for mine in found.values() for run in mine.values()]

    def counts(self) -> tuple[int, int]:
        done = sum(self.done.values())
        return done, done + sum(self.left.values())

    def seconds_left(self, but: str) -> float:
        """Return the seconds for all comparisons except ``but``, as if runs went one at a time. Comparisons of which
        nothing is known are left out."""
        return sum(self.left[name] * (self.one(name) or 0.0) for name in self.comparisons if name != but)

    def one(self, name: str) -> float | None:
        """Return the seconds of one run of a comparison: the mean of finished ones, or else the study's own estimate,
        scaled to this machine."""
        if self.seconds[name]:
            return statistics.fmean(self.seconds[name])
        pairs = [(statistics.fmean(mine), self.guesses.get(k)) for k, mine in self.seconds.items() if mine]
        paces = [mean / guess for mean, guess in pairs if guess]
        guess = self.guesses.get(name)
        if guess:
            return guess * (statistics.fmean(paces) if paces else 1.0)
        return statistics.fmean(mean for mean, _ in pairs) if pairs else None


class StudyClock(Clock):
    """Estimates the time left for the study while one of its comparisons runs."""

    def __init__(self, parallel: int, ledger: Ledger, name: str) -> None:
        guess = ledger.one(name)
        super().__init__(parallel, ledger.seconds[name] or ([guess] if guess else []))
        self.ledger, self.name, self.guessed = ledger, name, not ledger.seconds[name]

    def left(self, todo: int, active: Sequence[Active]) -> float | None:
        """Return the seconds left; ``todo`` counts the runs of the whole study."""
        if self.guessed and len(self.seconds) > 1:
            del self.seconds[0]  # what was a guess, now that a run has ended
            self.guessed = False
        here = super().left(max(self.ledger.left[self.name], len(active)), active)
        return None if here is None else here + self.ledger.seconds_left(self.name) / self.parallel


def work(
    console: Console,
    comparisons: Mapping[str, Comparison],
    minutes: Mapping[str, float | None],
    jobs: int,
    start: Start,
) -> list[str]:
    """Run what is missing, and return a sentence for every run that failed and was left out."""
    ledger = Ledger(comparisons, minutes)
    broken: list[str] = []
    for name, comparison in comparisons.items():
        with comparison.claimed() as keep_open:
            ledger.look(name)
            if not ledger.left[name]:
                continue

            def counts(name: str = name) -> tuple[int, int]:
                ledger.look(name)
                return ledger.counts()

            done, least = ledger.counts()
            console.print(f"{name}: {ledger.left[name]} of at least {least - done} runs left", highlight=False)
            with display(console, counts, StudyClock(jobs, ledger, name)) as shown:
                runs = comparison.folder / RUNS
                broken += run_all(comparison.wanted, runs, jobs, shown, start=start, keep_open=keep_open)
            ledger.look(name)
    return broken
