"""What a page is made of: plain, frozen values between the readers of files and the template.

May import ``orthoshard.lab.tables`` and `fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orthoshard.lab.report import fields
from orthoshard.lab.report.fields import Damaged
from orthoshard.lab.tables import Column


@dataclass(frozen=True)
class Cell:
    """``order`` is what the column is sorted by: a number, or None (last) where there is none; a text sorts itself."""

    text: str
    order: float | None = None
    number: bool = True


@dataclass(frozen=True)
class Table:
    """``note`` stands below it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers: they stand at its right."""
        return any(row[column].number for row in self.rows)


@dataclass(frozen=True)
class Axis:
    """A way to lay out the points from left to right: ``key`` names the list in `Line.x`."""

    key: str
    title: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    """``x`` by axis and ``y``, all of one length; ``dots``: marks alone, no line between them."""

    x: Mapping[str, Sequence[float]]
    y: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Series:
    """``lines`` by what is measured (a choice of the reader, as "validation"); ``shown`` at first."""

    label: str
    lines: Mapping[str, Line]
    shown: bool = True


@dataclass(frozen=True)
class Chart:
    """``values`` are the choices of what is measured; ``late``: the first tenth can be left out, for its fall flattens
    the rest."""

    title: str
    axes: tuple[Axis, ...]
    values: tuple[str, ...]
    unit: str
    series: tuple[Series, ...]
    log: bool = False
    late: bool = False
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """``svg`` in base64."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """``kind``: "runs", "comparison", "bench", "figures" or "plan"; ``sources``: the files it was read from; ``facts``:
    term and text; ``lists``: titles, and sentences below them; ``plan``: what the calculator may take from a plan."""

    title: str
    kind: str
    sources: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()
    plan: Mapping[str, Any] | None = None


def words(text: object) -> Cell:
    return Cell(str(text), None, number=False)


def number(value: float | None, form: Callable[[float], str]) -> Cell:
    """``form`` says how it reads; nothing where there is none."""
    return Cell("" if value is None else form(value), value)


def tabulate(title: str, columns: Sequence[Column], rows: Iterable[Any], note: str = "") -> Table:
    """The table that a command prints on a terminal, of rows that a file claims. Raises ``Damaged``."""
    made = tuple(tuple(_cell(column, row) for column in columns) for row in rows)
    return Table(title, tuple(column.heading for column in columns), made, note)


def _cell(column: Column, row: Any) -> Cell:
    try:
        value = column.value(row)
    except (KeyError, AttributeError):
        raise Damaged(f"it has no {column.key!r}") from None
    if column.words:
        fields.as_text(value, column.key)
        return words(column.text(row))
    order = fields.as_number(value, column.key)
    if order is None and column.none is None:
        raise Damaged(f"{column.key!r} is not a number")
    return Cell(column.text(row), order)


def thinned(count: int, most: int = 600) -> list[int]:
    """At most so many positions out of ``count``, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
