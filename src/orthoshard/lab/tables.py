"""Tables as all commands print them: on a terminal, and in Markdown. May import rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table


def sheet(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    left: Sequence[int] = (0,),
    wrap: bool = False,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """For a terminal. ``left``: columns of words, numbers stand at the right."""
    drawn = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    drawn.title, drawn.caption = title, caption
    for k, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if k in left else "right", no_wrap=not wrap, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """``left``: how many columns of words come first."""
    rule = "|" + "|".join("---" if k < left else "---:" for k in range(len(headings))) + "|"
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (headings, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of plain text, two blanks between columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
