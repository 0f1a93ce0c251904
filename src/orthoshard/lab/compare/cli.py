"""``orthoshard compare``: choose among its three forms, and run the first of them, grids of learning rates.

Exit codes: 0 done, 1 some runs failed and can be tried again, 2 a mistake that the user can correct, 130 and 143
stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from orthoshard.lab.bench import environment
from orthoshard.lab.compare import rivals as contestants
from orthoshard.lab.compare import settings
from orthoshard.lab.compare.comparison import Comparison, find_reference, read
from orthoshard.lab.compare.display import Clock, display
from orthoshard.lab.compare.folder import RUNS
from orthoshard.lab.compare.grid import Grid, at_least_left
from orthoshard.lab.compare.pool import Start, run_all, start_process
from orthoshard.lab.compare.rivals import Rival
from orthoshard.lab.compare.settings import ManyRuns
from orthoshard.lab.compare.table import screen
from orthoshard.lab.compare.torchrun_workers import dismiss, serve, starter
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.torchrun import Torchrun, started_by_torchrun
from orthoshard.lab.verb import WIDTH, exit_code

IDLE_SECONDS = 30 * 86400.0  # for which a rank may wait for the next run


@dataclass(frozen=True)
class Command(ManyRuns):
    """Train the same model on the same data under several optimizers, each at its own best learning rates.

    By default AdamW, Muon with and without Nesterov momentum, Dion at full rank, 1/4 and 1/16, and DionTail at 1/4
    and 1/16, on the training run of `orthoshard train`. Each has two rates tuned: that of its matrices first, then that
    of embeddings, heads, norms and biases. A grid starts with values a factor of 2 apart and grows while the best
    lies on its edge. You can stop it at any moment; the same command continues. The table, the plot and all numbers
    are in --out: table.md, compare.png, results.json.

    examples:
      orthoshard compare
      orthoshard compare --only adamw 'dion*' --seeds 0 1 2 --jobs 2
      orthoshard compare --preset quick --out runs/quick-comparison
      orthoshard compare --report-only

    two other forms, each with its own --help:
      orthoshard compare --search     search learning rates, rank, momentum and decay by optuna
      orthoshard compare STUDY        a study: several comparisons and their figures; `paper`, or a TOML file
    """

    out: Path = Path("runs/compare")
    """The folder of the comparison: a new one, or one to continue."""
    optimizers: Path | None = None
    """A TOML file of optimizers instead of the default ones: tables [[rival]] with label, name, lr and any other
    setting of an optimizer of `orthoshard train`."""
    only: tuple[str, ...] = ()
    """Only these of them, by label; patterns such as 'dion*'."""
    reference: str | None = None
    """The optimizer whose best loss the others should reach; by default the first AdamW."""
    points: int = 3
    """Learning rates of matrices that every grid starts with; 1: no grid."""
    scalar_points: int = 3
    """Learning rates of embeddings, heads, norms and biases that the second grid starts with; 1: no second grid."""
    scalar_lr: float = 0.012
    """The middle of the second grid, for optimizers that do not set their own."""
    most: int = 7
    """The most learning rates that a grid may try."""
    seeds: tuple[int, ...] = (0,)
    """Seeds. The grids run on the first one; the best pair of rates also on the others."""
    report_only: bool = False
    """Run nothing; make the table, plot and JSON again from the runs in --out."""


def main(argv: Sequence[str] | None = None, start: Start = start_process) -> int:
    """Run what the arguments ask for: ``STUDY ...``, ``--search ...``, or the flags of grids."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        from orthoshard.lab.compare.study import cli as study

        return study.main(arguments, start)
    if "--search" in arguments:
        from orthoshard.lab.compare.search import cli as search

        arguments.remove("--search")
        return search.main(arguments, start)
    if started_by_torchrun():
        return _crowd(arguments)
    return _command(arguments, start)


def _crowd(arguments: list[str]) -> int:
    """Run under torchrun: rank 0 compares, and the other ranks help with each run."""
    torchrun = Torchrun.enter(IDLE_SECONDS)
    if torchrun.rank:
        serve(torchrun)
        return 0
    try:
        return _command(arguments, starter(torchrun))
    finally:
        dismiss(torchrun)


def _command(arguments: list[str], start: Start) -> int:
    return exit_code("compare", lambda: _main(parse(arguments), start), resumes=True)


def parse(arguments: Sequence[str]) -> Command:
    return settings.parse(Command, "orthoshard compare", arguments)


def _main(command: Command, start: Start) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if command.report_only:
        _show(console, read(command.out))
        return 0
    if command.jobs > 1 and started_by_torchrun():
        raise UserError("under torchrun every run takes all processes; leave --jobs out.")
    comparison = prepare(command)
    with comparison.claimed() as keep_open:
        broken = _run(console, comparison, command.jobs, start, keep_open)
    _show(console, comparison)
    return tell(broken)


def tell(broken: Sequence[str]) -> int:
    """Print which runs failed, and return the exit code."""
    for sentence in broken:
        print(f"orthoshard compare: {sentence}", file=sys.stderr)
    return 1 if broken else 0


def prepare(command: Command) -> Comparison:
    """Return the comparison that the flags describe, after preparing its data and building its optimizers once. Raises
    ``UserError`` for any mistake, before anything is written to its folder."""
    chosen = contestants.choose(_rivals(command), command.only)
    grid = Grid(command.points, command.most, command.seeds, command.scalar_points)
    reference = find_reference(chosen, command.reference)
    comparison = Comparison(command.out, command.base(0), chosen, grid, reference, digest="")
    comparison.check()
    base = replace(comparison.base, seed=command.seeds[0])
    return replace(comparison, digest=settings.try_out(base, {rival.label: rival.config for rival in chosen}))


def _run(console: Console, comparison: Comparison, parallel: int, start: Start, keep_open: Sequence[int]) -> list[str]:
    def counts() -> tuple[int, int]:
        found = comparison.collect()
        done = sum(len(mine) for mine in found.values())
        return done, done + at_least_left(list(comparison.states(found).values()))

    known = [run.wall_seconds for mine in comparison.collect().values() for run in mine.values()]
    with display(console, counts, Clock(parallel, known)) as shown:
        return run_all(comparison.wanted, comparison.folder / RUNS, parallel, shown, start=start, keep_open=keep_open)


def _show(console: Console, comparison: Comparison) -> None:
    made = comparison.report({"report": environment.describe()})
    console.print(screen(made, comparison.reference, console.width))
    out = comparison.folder
    console.print(f"In {out}: table.md, compare.png, results.json", highlight=False, soft_wrap=True)


def _rivals(command: Command) -> tuple[Rival, ...]:
    """Return the optimizers, with the scalar learning rate of the flags if they do not set their own."""
    given = contestants.DEFAULT if command.optimizers is None else contestants.load(command.optimizers)

    def complete(rival: Rival) -> Rival:
        if rival.config.scalar_lr is not None:
            return rival
        return replace(rival, config=replace(rival.config, scalar_lr=command.scalar_lr))

    return tuple(complete(rival) for rival in given)
