"""Reading the files and folders of the command line as sections of the page. Their contents decide, not their names.

    a folder with run.jsonl, or that file                      a run of `orthoshard train`
    a folder with results.json, or that file                   a comparison of `orthoshard compare`
    a folder with figures, or one figure's JSON                figures of a study (`orthoshard compare STUDY`)
    JSON with "contestants"                                    `orthoshard bench`
    JSON as `orthoshard plan --json` writes it                 a plan, or with --check a comparison with measured steps

Anything else, and damaged files, raise a ``UserError`` that names the path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orthoshard.lab.compare.folder import RESULTS, SETTINGS
from orthoshard.lab.report import benches, checks, comparisons, fields, figures, plans
from orthoshard.lab.report.content import Section
from orthoshard.lab.report.curves import Run, read_run, runs_section
from orthoshard.lab.report.fields import Damaged
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.record import NAME as RECORD

READERS = (comparisons, plans, figures, checks, benches)  # the first that recognises a file reads it
KINDS = (
    "the folder of a run of `orthoshard train` (with run.jsonl), of `orthoshard compare` (with results.json), of "
    "figures of a study, or the JSON of `orthoshard bench` or `orthoshard plan`"
)


def read(paths: Sequence[Path]) -> list[Section]:
    """Return the sections: one with all runs of `train` first, then the rest in their order. Raises ``UserError``."""
    runs: list[Run] = []
    sections: list[Section] = []
    refused: list[str] = []
    for path in _unique(paths):
        try:
            found = _read(path)
        except Damaged as error:
            refused.append(f"{path} is damaged: {error}.")
            continue
        except UserError as error:
            refused.append(str(error))
            continue
        if isinstance(found, Run):
            runs.append(found)
        else:
            sections.append(found)
    if len(refused) > 1:
        each = "; ".join(sentence.removesuffix(f"; give {KINDS}.").removesuffix(".") for sentence in refused)
        raise UserError(f"{len(refused)} of {len(paths)} cannot be shown: {each}; leave them out, or give {KINDS}.")
    if refused:
        raise UserError(refused[0])
    return [*([runs_section(runs)] if runs else []), *sections]


def _unique(paths: Sequence[Path]) -> list[Path]:
    """Return the paths without duplicates. A folder and the file in it are the same."""
    found: dict[Path, Path] = {}
    for path in paths:
        place = path.resolve()
        found.setdefault(place.parent if place.name in (RECORD, RESULTS) else place, path)
    return list(found.values())


def _read(path: Path) -> Run | Section:
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise UserError(f"there is no {path}; give {KINDS}.")
    if path.name == RECORD:
        return _run(path.parent)
    if path.suffix == ".json":
        return _json(path)
    raise UserError(f"{path} is nothing that a report can show; give {KINDS}.")


def _folder(path: Path) -> Run | Section:
    if (path / RECORD).is_file():
        return _run(path)
    results = path / RESULTS
    if results.is_file() and (known := _known(results)) is not None:
        return known
    if (path / SETTINGS).is_file():
        raise UserError(
            f"{path} holds a comparison without {RESULTS}; make it by: orthoshard compare --report-only --out {path}"
        )
    inner = path / "figures"
    drawn = _figures(path) or (_figures(inner) if inner.is_dir() else [])
    if drawn:
        return figures.gathered(path, drawn)
    if results.is_file():
        return _json(results)
    raise UserError(f"{path} holds nothing that a report can show; give {KINDS}.")


def _run(folder: Path) -> Run:
    try:
        return read_run(folder)
    except RecursionError as error:
        raise UserError(f"{folder / RECORD} is damaged: a line of it is nested too deeply.") from error
    except OSError as error:
        raise UserError(f"{folder / RECORD} cannot be read ({error.strerror or error}).") from error


def _figures(folder: Path) -> list[figures.Figure]:
    """Return the figures in a folder; other files are ignored. Raises ``UserError``."""
    made: list[figures.Figure] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = fields.load(path)
            if figures.recognised(found):
                made.append(figures.figure(found, path))
        except Damaged as error:
            raise UserError(f"{path} is damaged: {error}.") from error
    return made


def _json(path: Path) -> Section:
    known = _known(path)
    if known is None:
        raise UserError(f"{path} is JSON, but of no kind that a report can show; give {KINDS}.")
    return known


def _known(path: Path) -> Section | None:
    """Return the section of a JSON file, or None if it is valid JSON of another kind. Raises ``UserError``."""
    try:
        found = fields.load(path)
        reader = next((reader for reader in READERS if reader.recognised(found)), None)
        return None if reader is None else reader.section(found, str(path))
    except Damaged as error:
        raise UserError(f"{path} is damaged: {error}.") from error
