"""The display of a running comparison: bars with the time left on a terminal; elsewhere a line for each finished run.

May import rich and ``orthoshard.lab.compare``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orthoshard.lab.compare.job import Job, Outcome
from orthoshard.lab.compare.pool import Active, Listener

Counts = Callable[[], tuple[int, int]]  # (runs done, runs there will be at least)


class Clock:
    """Estimates the time left from the runs that ended since the start, or else from the steps of the first run."""

    def __init__(self, parallel: int, known: Sequence[float] = ()) -> None:
        self.parallel = parallel
        self.seconds = list(known)

    def left(self, todo: int, active: Sequence[Active]) -> float | None:
        """Return the seconds for ``todo`` runs, including running ones; None if nothing is known yet."""
        shares = [(each.step() / each.job.config.schedule.steps, time.monotonic() - each.started) for each in active]
        guesses = self.seconds or [spent / share for share, spent in shares if share > 0.02]
        if not guesses:
            return None
        one = statistics.fmean(guesses)
        return max(0.0, one * (todo - sum(share for share, _ in shares)) / max(1, min(self.parallel, todo)))


def words(seconds: float | None) -> str:
    """Return a time such as ``1 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def line(job: Job, found: Outcome) -> str:
    outcome = f"{found.loss:.3f}" if found.status == "finished" else "diverged"
    return f"{job.label:18} {job.rates:30} seed {job.spot.seed}   {outcome}"


class Plain(Listener):
    def __init__(self, counts: Counts, clock: Clock, say: Callable[[str], None]) -> None:
        self.counts, self.clock, self.say = counts, clock, say
        self.active: Sequence[Active] = ()

    def finished(self, job: Job, found: Outcome, seconds: float) -> None:
        self.clock.seconds.append(seconds)
        done, least = self.counts()
        left = words(self.clock.left(least - done, [each for each in self.active if each.job != job]))
        self.say(f"{line(job, found)}   ({done} of at least {least} runs, {left} left)")

    def failed(self, job: Job, sentence: str) -> None:
        self.say(sentence)

    def watch(self, active: Sequence[Active]) -> None:
        self.active = tuple(active)


class Bars(Listener):
    def __init__(self, counts: Counts, clock: Clock, bars: Progress) -> None:
        self.counts, self.clock, self.bars = counts, clock, bars
        self.total = bars.add_task("[b]all runs", total=None, note="")
        self.tasks: dict[str, TaskID] = {}
        self.done, self.least = counts()

    def finished(self, job: Job, found: Outcome, seconds: float) -> None:
        self.clock.seconds.append(seconds)
        self._forget(job)
        self.bars.console.print(line(job, found), highlight=False)

    def failed(self, job: Job, sentence: str) -> None:
        self._forget(job)
        self.bars.console.print(f"[red]{sentence}[/red]", highlight=False)

    def watch(self, active: Sequence[Active]) -> None:
        for each in active:
            if each.job.folder not in self.tasks:
                name = f"{each.job.label} {each.job.rates} seed {each.job.spot.seed}"
                self.tasks[each.job.folder] = self.bars.add_task(name, total=each.job.config.schedule.steps, note="")
            step = each.step()
            note = f"step {step}" if step else "starting"
            self.bars.update(self.tasks[each.job.folder], completed=step, note=note)
        left = self.clock.left(self.least - self.done, active)
        share = sum(each.step() / each.job.config.schedule.steps for each in active)
        note = f"{self.done} of at least {self.least}, {words(left)} left"
        self.bars.update(self.total, completed=self.done + share, total=self.least, note=note)

    def _forget(self, job: Job) -> None:
        task = self.tasks.pop(job.folder, None)
        if task is not None:
            self.bars.remove_task(task)
        self.done, self.least = self.counts()


@contextmanager
def display(console: Console, counts: Counts, clock: Clock) -> Generator[Listener]:
    if console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
        with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bars:
            yield Bars(counts, clock, bars)
    else:
        yield Plain(counts, clock, lambda text: print(text, flush=True))
