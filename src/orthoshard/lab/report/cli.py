"""``orthoshard report``: reads all its input, then writes one page.

Exit codes: 0 done, 2 a mistake that the user can correct. May import tyro, jinja2 and ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from orthoshard.lab.bench.files import claim, write_text
from orthoshard.lab.report import sources
from orthoshard.lab.report.calculator import START, calculator
from orthoshard.lab.report.page import render
from orthoshard.lab.train.errors import UserError, disk_error
from orthoshard.lab.verb import exit_code, read_flags


@dataclass(frozen=True)
class Command:
    """Make one HTML page that shows runs, comparisons, figures, benchmarks and plans, with a calculator.

    The page needs no network and no other file, so it can be sent to anyone and opened anywhere.

    examples:
      orthoshard report runs/compare --out page.html
      orthoshard report runs/shakespeare-dion-* benchmarks/results/gpt2-small-*.json plan.json --out page.html
      orthoshard report --out calculator.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of `orthoshard train` (with run.jsonl) or `orthoshard compare` (with results.json, or a study with
    figures), and JSON files of `orthoshard bench`, `orthoshard plan --json` or figures. If left out: only the
    calculator."""
    out: Path = Path("report.html")
    """The page to write. An existing page is replaced; any other existing file is refused."""
    title: str = "orthoshard report"
    """Title of the page."""
    no_calculator: bool = False
    """Leave the calculator out."""


def main(argv: Sequence[str] | None = None) -> int:
    command = read_flags(Command, "orthoshard report", argv)
    return exit_code("report", lambda: print(run(command)))


def run(command: Command) -> str:
    """Write the page and return a line about it. Raises ``UserError`` or ``ValueError``."""
    if not command.runs and command.no_calculator:
        raise UserError("there is nothing to show; name a run, or leave out --no-calculator.")
    claim(command.out, inputs=command.runs)
    if not _replaceable(command.out):
        raise UserError(f"--out {command.out} is there and is no page of HTML; give --out another file, or remove it.")
    sections = sources.read(command.runs)
    plans = [section.plan for section in sections if section.plan is not None]
    plain, start = (None, START) if command.no_calculator else calculator(plans)
    page = render(command.title, sections, plain, start)
    try:
        write_text(command.out, page)
    except OSError as error:
        known = disk_error(error, command.out, "make room there, or give --out another place.")
        assert known is not None
        raise known from error
    shown = [section.title for section in sections] + ([] if command.no_calculator else ["Calculator"])
    return f"{command.out} ({len(page.encode()) / 1e6:.2f} MB): {'; '.join(shown)}"


def _replaceable(out: Path) -> bool:
    """Return whether the file may be replaced: it does not exist, is empty, or is a page."""
    if not out.is_file():
        return True
    with out.open("rb") as file:
        start = file.read(200).lstrip().lower()
    return not start or start.startswith((b"<!doctype html", b"<html"))
