"""The contents of a page, as plain frozen values between the readers of files and the template.

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
    """A cell. A column of numbers is sorted by ``order``, with None last; a column of words is sorted by ``text``."""

    text: str
    order: float | None = None
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table, with ``note`` below it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def numeric(self, column: int) -> bool:
        """Return whether a column holds numbers, which are aligned right."""
        return any(row[column].number for row in self.rows)


@dataclass(frozen=True)
class Axis:
    """A choice for the x axis: ``key`` names the list in `Line.x`."""

    key: str
    title: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    """Points: ``x`` by axis, and ``y``, all of one length. With ``dots``, they are marks without a line."""

    x: Mapping[str, Sequence[float]]
    y: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Series:
    """A series with its ``lines`` by measured value, such as "validation". ``shown``: whether it shows at first."""

    label: str
    lines: Mapping[str, Line]
    shown: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart. The reader chooses one of ``axes`` and one of ``values``.

    With ``late``, the reader can leave out the first tenth, whose steep fall flattens the rest.
    """

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
    """A figure, with its ``svg`` in base64."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        kind: "runs", "comparison", "bench", "check", "figures" or "plan".
        sources: the files from which it was read.
        facts: pairs of term and text.
        lists: titles, each with sentences.
        plan: values of a plan for the calculator.
    """

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
    """Return the table that a command prints on a terminal, after checking rows from a file. Raises ``Damaged``."""
    return Table(title, tuple(column.heading for column in columns), tuple(cells(columns, row) for row in rows), note)


def cells(columns: Sequence[Column], row: Any) -> tuple[Cell, ...]:
    """Return the cells of a row from a file. Raises ``Damaged``."""
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
    """Return at most ``most`` positions out of ``count``, evenly spaced, including the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
