"""``orthoshard compare STUDY``: the flags, the order of the work, and where the figures are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from orthoshard.lab.bench import environment
from orthoshard.lab.bench.files import claim, write_json, write_text
from orthoshard.lab.compare.cli import tell
from orthoshard.lab.compare.comparison import Comparison, read
from orthoshard.lab.compare.folder import SETTINGS
from orthoshard.lab.compare.pool import Start, start_process
from orthoshard.lab.compare.study import file as studies
from orthoshard.lab.compare.study.figures import KINDS
from orthoshard.lab.compare.study.file import Figure
from orthoshard.lab.compare.study.results import Results, gather
from orthoshard.lab.compare.study.work import prepare, work
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.torchrun import started_by_torchrun
from orthoshard.lab.verb import WIDTH, exit_code, read_flags

RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class Command:
    """Run a study, comparisons of optimizers each tuned alike, and draw its figures: `paper`, those of the Dion
    paper (arXiv 2504.05295) at a size that fits two cores, or a file of your own.

    You can stop it at any moment; the same command continues. Each figure is an SVG and a JSON with all of its numbers.

    examples:
      orthoshard compare paper
      orthoshard compare paper --only width-64 wire
      orthoshard compare paper --report-only --figures docs/figures
      orthoshard compare my-study.toml --out runs/mine --use width-256=runs/compare
    """

    study: Annotated[str, tyro.conf.Positional]
    """`paper`, or the path of a study: a TOML file with [[comparison]] and [[figure]] tables."""
    out: Path | None = None
    """The folder of the study: a folder of `orthoshard compare` for each comparison. A new one, or one to
    continue; by default runs/ and the name of the study."""
    figures: Path | None = None
    """Where the figures go; by default `figures` in --out."""
    grid: Literal["small", "large"] | None = None
    """Size of the study that comes with orthoshard: `small` (the default) takes about an hour on two cores with
    --jobs 2, `large` takes days."""
    only: tuple[str, ...] = ()
    """Only these comparisons with their figures, or only these figures with the comparisons that they need: names, or
    patterns such as 'width-*'."""
    use: tuple[str, ...] = ()
    """NAME=FOLDER: use the results of `orthoshard compare` in FOLDER for the comparison NAME, and do not run it. A NAME
    that is not in the study adds a comparison to every figure with a matching pattern."""
    report_only: bool = False
    """Run nothing; draw the figures again from the finished runs."""
    jobs: int = 1
    """Runs at the same time. They share the cores, so compare times only between runs with the same --jobs."""
    threads: int = 0
    """CPU threads of a run; 0 lets torch choose, or divides the cores among the --jobs."""


def main(arguments: Sequence[str], start: Start = start_process) -> int:
    command = read_flags(Command, "orthoshard compare", arguments)
    return exit_code("compare", lambda: _main(command, start), resumes=True)


def _main(command: Command, start: Start) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if started_by_torchrun():
        raise UserError("a study runs in one process; run it without torchrun.")
    if command.jobs < 1:
        raise UserError(f"--jobs is {command.jobs}; give the runs at the same time, at least 1.")
    used = _used(command.use)
    path = studies.find(command.study, command.grid)
    kinds = {name: kind.options for name, kind in KINDS.items()}
    study = studies.load(path, kinds, tuple(used))
    run, figures = study.only(command.only)
    out = command.out or RUNS_FOLDER / Path(command.study).stem
    folder = command.figures or out / "figures"
    claim(folder / f"{figures[0].name if figures else 'figure'}.svg", "--figures")
    planned = [each for each in run if each.name not in used and not command.report_only]
    others = {name: read(place) for name, place in used.items()}
    found = {each.name: prepare(each, out, command.jobs, command.threads) for each in planned}
    broken = work(console, found, {each.name: each.minutes for each in planned}, command.jobs, start)
    found |= others
    for name in [each.name for each in study.comparisons if each.name not in found]:
        if (out / name / SETTINGS).exists():
            found[name] = read(out / name)
    if command.report_only and study.comparisons and not found:
        raise UserError(f"there is nothing of {study.title} in {out}; start it without --report-only.")
    _draw(console, figures, study.source.name, found, folder)
    return tell(broken)


def _used(pairs: Sequence[str]) -> dict[str, Path]:
    used: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--use {pair!r} is no NAME=FOLDER, such as width-256=runs/compare.")
        used[name] = Path(folder)
    return used


def _draw(
    console: Console, figures: Sequence[Figure], source: str, found: Mapping[str, Comparison], folder: Path
) -> None:
    """Write every figure that has any finished run."""
    results = {name: gather(name, comparison) for name, comparison in found.items()}
    for figure in figures:
        given = [results[name] for name in figure.comparisons if name in results]
        given = [each for each in (each.choose(figure.rivals) for each in given) if any(row.tried for row in each.rows)]
        if not given and figure.comparisons:
            console.print(f"{figure.name}: nothing has been run for it yet", highlight=False)
            continue
        note = _write(figure, given, source, folder)
        console.print(f"{folder / figure.name}.svg: {figure.title}{note}", highlight=False, soft_wrap=True)


def _write(figure: Figure, given: Sequence[Results], source: str, folder: Path) -> str:
    """Write the files of a figure, and return a text about it."""
    try:
        drawn = KINDS[figure.kind].draw(given, figure.options)
    except UserError as error:
        raise UserError(f"the figure {figure.name}: {error}") from error
    partly = [each.name for each in given if not each.complete]
    missing = [name for name in figure.comparisons if name not in [each.name for each in given]]
    about: dict[str, Any] = {
        "name": figure.name,
        "kind": figure.kind,
        "title": figure.title,
        "caption": drawn.caption,
        "study": source,
        "unfinished": partly,
        "missing": missing,
        "report": environment.describe(),
        "comparisons": {each.name: each.about() for each in given},
    }
    write_json(folder / f"{figure.name}.json", about | {"data": drawn.data}, indent=None)
    write_text(folder / f"{figure.name}.svg", drawn.svg)
    if drawn.table is not None:
        write_text(folder / f"{figure.name}.md", f"{drawn.table}\n{drawn.caption}\n")
    notes = [f"{what}: {', '.join(names)}" for what, names in (("unfinished", partly), ("missing", missing)) if names]
    return f" ({'; '.join(notes)})" if notes else ""
