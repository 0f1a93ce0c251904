"""What a page is made of: plain, frozen values between the readers of files and the template.

May import ``orthoshard.lab.tables`` and `fields`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def tabulate(title: str, columns: Sequence[Column], rows: Iterable[Any], note: str = "") -> Table:
    """The table that a command prints on a terminal, of rows that a file claims. Raises ``Damaged``."""
    return Table(title, tuple(column.heading for column in columns), tuple(cells(columns, row) for row in rows), note)


def cells(columns: Sequence[Column], row: Any) -> tuple[Cell, ...]:
    """Raises ``Damaged``."""
    return tuple(_cell(column, row) for column in columns)


def _cell(column: Column, row: Any) -> Cell:
    try:
        value = column.value(row)
    except (KeyError, AttributeError):
        raise Damaged(f"it has no {column.key!r}") from None
    if value is None and column.none is None:
        raise Damaged(f"{column.key!r} is null")
    if not column.words:
        order = fields.as_number(value, column.key)
        return Cell(column.text(row), order)
    if value is not None:
        fields.as_text(value, column.key)
    return Cell(column.text(row), number=False)


def thinned(count: int, most: int = 600) -> list[int]:
    """At most so many positions out of ``count``, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
