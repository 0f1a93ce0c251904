"""Tables as all commands print them: on a terminal, in Markdown, and on a report's page. May import rich.

A table is its columns: each says what it is called, where a row has its value, and how that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One column, of rows that are objects or mappings.

    Args:
        heading: its name.
        key: the value's attribute or key; dots lead into an object or mapping inside the row.
        form: how a value reads.
        none: what stands there where a row has no value, or a function of the row; None where every row has one.
        cell: how a value reads, from the whole row, where more than the value decides it.
        short: the heading on a terminal, where it is another.
        words: whether it holds words, at the left; numbers stand at the right.
    """

    heading: str
    key: str
    form: Callable[[Any], str] = str
    none: str | Callable[[Any], str] | None = None
    cell: Callable[[Any], str] | None = None
    short: str | None = None
    words: bool = False

    def value(self, row: Any) -> Any:
        """Raises ``KeyError`` or ``AttributeError`` where a row lacks what every row has."""
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
    """For a terminal. ``style`` is that of a row."""
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
    """The same from ready texts. ``left``: columns of words."""
    drawn = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    drawn.title, drawn.caption = title, caption
    for k, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if k in left else "right", no_wrap=not wrap, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    texts = [[column.heading for column in columns], *([column.text(row) for column in columns] for row in rows)]
    rule = "|" + "|".join("---" if column.words else "---:" for column in columns) + "|"
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in texts]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of plain text, two blanks between columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
