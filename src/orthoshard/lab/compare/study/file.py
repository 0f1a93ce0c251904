"""A study: comparisons to run, and figures to draw from them, as a TOML file.

    title = "..."
    [[comparison]]
    name = "width-128"              its folder below --out, one of `orthoshard compare`
    rivals = "rivals.toml"          beside the study; without it, the optimizers that `compare` has by default
    flags = ["--model", "tiny"]     of `orthoshard compare`
    minutes = 1                     about what one run takes on one core: for the time left while none has ended
    diagnostics = 10                steps between records of each matrix, as of `orthoshard train --diagnostics`
    [[figure]]
    name = "loss-by-width"          its file
    kind = "final-loss"             see `figures`; every further key is one of that kind's options
    comparisons = ["width-*"]       all of them, if it is left out; [] for a kind that needs none
    rivals = ["adamw", "dion-*"]    all of them, if it is left out

May import the standard library and ``orthoshard.lab.train.errors``.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orthoshard.lab.train.errors import UserError, unknown

BUILT_IN = Path(__file__).parent / "studies"
GRIDS = ("small", "large")
OURS = ("--out", "--optimizers", "--jobs", "--threads", "--report-only")  # said once, to the study


@dataclass(frozen=True)
class Planned:
    """One comparison. ``rivals`` is the file of its optimizers."""

    name: str
    flags: tuple[str, ...] = ()
    rivals: Path | None = None
    minutes: float | None = None
    diagnostics: int = 0


@dataclass(frozen=True)
class Figure:
    """One figure. ``comparisons`` are names; ``rivals`` are patterns of labels, or empty for all; ``options`` are
    those of its kind."""

    name: str
    kind: str
    title: str
    comparisons: tuple[str, ...]
    rivals: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Study:
    title: str
    source: Path
    comparisons: tuple[Planned, ...]
    figures: tuple[Figure, ...]

    def only(self, patterns: Sequence[str]) -> tuple[tuple[Planned, ...], tuple[Figure, ...]]:
        """Return what to run and what to draw: the named comparisons with their figures, and the named figures with the
        comparisons that they need; everything if there is no pattern. Raises ``UserError``."""
        if not patterns:
            return self.comparisons, self.figures
        names = [each.name for each in (*self.comparisons, *self.figures)]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise unknown("comparison or figure", pattern, names)
        meant = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        needed = {name for figure in self.figures if figure.name in meant for name in figure.comparisons}
        run = tuple(each for each in self.comparisons if each.name in meant | needed)
        return run, tuple(each for each in self.figures if each.name in meant or meant.intersection(each.comparisons))


def find(name: str, grid: str | None) -> Path:
    """Return the file of a study that comes with orthoshard, by name, or the given path. Raises ``UserError``."""
    known = sorted({path.stem.rpartition("-")[0] for path in BUILT_IN.glob("*-small.toml")})
    if name in known:
        return BUILT_IN / f"{name}-{grid or GRIDS[0]}.toml"
    path = Path(name)
    if not path.is_file():
        raise unknown("study", name, known, also="the path of a TOML file")
    if grid is not None:
        raise UserError(
            f"--grid {grid} is for the studies that come with orthoshard ({', '.join(known)}); leave it out."
        )
    return path


def load(path: Path, kinds: Mapping[str, frozenset[str]], more: Sequence[str] = ()) -> Study:
    """Return the study in a file. ``kinds`` has the options of each kind of figure; ``more`` has names of comparisons
    beyond those of the file. Raises ``UserError``."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"the study in {path} cannot be read ({error}); give a TOML file.") from error
    for key in document:
        if key not in ("title", "comparison", "figure"):
            raise UserError(f"in {path}: {unknown('key', key, ['title', 'comparison', 'figure'])}")
    comparisons = tuple(_comparison(table, where, path) for table, where in _tables(document, "comparison", path))
    comparisons += tuple(Planned(name) for name in more if name not in [each.name for each in comparisons])
    names = [each.name for each in comparisons]
    figures = tuple(_figure(table, where, names, kinds) for table, where in _tables(document, "figure", path))
    if not comparisons and not figures:
        raise UserError(f"{path} names neither a [[comparison]] nor a [[figure]]; give it at least one.")
    for names in ([each.name for each in comparisons], [each.name for each in figures]):
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"in {path}: two are called {name!r}; give each its own name.")
    return Study(str(document.get("title", path.stem)), path, comparisons, figures)


def _tables(document: Mapping[str, Any], key: str, path: Path) -> list[tuple[dict[str, Any], str]]:
    tables: object = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in cast("list[object]", tables)):
        raise UserError(f"in {path}: begin each {key} with a line [[{key}]].")
    return [
        (dict(table), f"{path}, {key} {k}") for k, table in enumerate(cast("list[dict[str, Any]]", tables), start=1)
    ]


def _comparison(table: dict[str, Any], where: str, path: Path) -> Planned:
    name, rivals, minutes = _name(table, where), table.pop("rivals", None), table.pop("minutes", None)
    flags = _strings(table, "flags", where)
    if rivals is not None and not isinstance(rivals, str):
        raise UserError(f"in {where}: rivals is the name of a TOML file beside the study, not {rivals!r}.")
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise UserError(f"in {where}: minutes is {minutes!r}; give about what one run takes, above 0.")
    every = table.pop("diagnostics", 0)
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise UserError(f"in {where}: diagnostics is {every!r}; give the steps between records, such as 10.")
    for flag in flags:
        if flag.partition("=")[0] in OURS:
            raise UserError(f"in {where}: {flag} is said to `orthoshard compare STUDY` itself; leave it out of flags.")
    _nothing_left(table, where, ("name", "rivals", "flags", "minutes", "diagnostics"))
    return Planned(name, flags, path.parent / rivals if rivals else None, minutes, every)


def _figure(table: dict[str, Any], where: str, names: Sequence[str], kinds: Mapping[str, frozenset[str]]) -> Figure:
    name, kind, title = _name(table, where), table.pop("kind", None), table.pop("title", "")
    if kind not in kinds:
        raise UserError(f"in {where}: {unknown('kind of figure', str(kind), kinds)}")
    chosen: list[str] = []
    for pattern in _strings(table, "comparisons", where, ["*"]):
        found = fnmatch.filter(names, pattern)
        if not found and pattern != "*":
            raise UserError(f"in {where}: {unknown('comparison', pattern, names)}")
        chosen += [name for name in found if name not in chosen]
    rivals = _strings(table, "rivals", where)
    known = ("name", "kind", "title", "comparisons", "rivals", *sorted(kinds[kind]))
    _nothing_left({key: value for key, value in table.items() if key not in kinds[kind]}, where, known)
    return Figure(name, str(kind), str(title) or name, tuple(chosen), rivals, table)


def _name(table: dict[str, Any], where: str) -> str:
    name = table.pop("name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f'in {where}: give it a name fit for a file, such as name = "width-128", not {name!r}.')
    return name


def _strings(table: dict[str, Any], key: str, where: str, default: Sequence[str] = ()) -> tuple[str, ...]:
    value = table.pop(key, list(default))
    if not isinstance(value, list) or not all(isinstance(item, str) for item in cast("list[object]", value)):
        raise UserError(f'in {where}: {key} is a list of strings, such as ["adamw", "dion-*"], not {value!r}.')
    return tuple(cast("list[str]", value))


def _nothing_left(table: Mapping[str, Any], where: str, known: Sequence[str]) -> None:
    for key in table:
        raise UserError(f"in {where}: {unknown('key', key, known)}")
