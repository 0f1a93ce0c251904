"""Tables as all commands print them: on a terminal, in Markdown, and on a report's page. May import rich.

A table is a list of columns. Each column has a heading, the place of its value in a row, and a way to print the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One column. Rows are objects or mappings.

    Args:
        heading: name of the column.
        key: attribute or key of the value; dots lead into an object or mapping inside the row.
        form: returns the text of a value.
        none: text of a missing value, or a function of the row that returns it; None if every row must have a value.
        cell: returns the text from the whole row, in place of ``form``, if the text depends on more than the value.
        short: heading on a terminal, if it differs there.
        words: whether the column holds words, which are aligned left; numbers are aligned right.
    """

    heading: str
    key: str
    form: Callable[[Any], str] = str
    none: str | Callable[[Any], str] | None = None
    cell: Callable[[Any], str] | None = None
    short: str | None = None
    words: bool = False

    def value(self, row: Any) -> Any:
        """Return the value in ``row``. Raises ``KeyError`` or ``AttributeError`` if ``row`` lacks a required value."""
        found = row
        for key in self.key.split("."):
            if found is None and self.none is not None:
                return None
            if isinstance(found, Mapping):
                found = found[key] if self.none is None else found.get(key)
            else:
                found = getattr(found, key)
        return found

    def text(self, row: Any) -> str:
        """Return the text of the cell in ``row``."""
        value = self.value(row)
        if value is None and self.none is not None:
            return self.none if isinstance(self.none, str) else self.none(row)
        return self.form(value) if self.cell is None else self.cell(row)


def screen(
    columns: Sequence[Column],
    rows: Iterable[Any],
    *,
    style: Callable[[Any], str | None] = lambda row: None,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """Return a table for a terminal. ``style`` returns the rich style of a row."""
    headings = [column.heading if column.short is None else column.short for column in columns]
    left = [k for k, column in enumerate(columns) if column.words]
    drawn = sheet(headings, left=left, title=title, caption=caption)
    for row in rows:
        drawn.add_row(*(column.text(row) for column in columns), style=style(row))
    return drawn


def sheet(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    left: Sequence[int] = (0,),
    wrap: bool = False,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """Return a table for a terminal from texts; ``left`` are the numbers of the columns that are aligned left."""
    drawn = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    drawn.title, drawn.caption = title, caption
    for k, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if k in left else "right", no_wrap=not wrap, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Return a Markdown table."""
    texts = [[column.heading for column in columns], *([column.text(row) for column in columns] for row in rows)]
    rule = "|" + "|".join("---" if column.words else "---:" for column in columns) + "|"
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in texts]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line of plain text for each row, with columns aligned left, two spaces apart."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
