"""The JSON of `orthoshard plan --check`: predicted beside measured steps.

May import this room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoshard.lab.report import fields
from orthoshard.lab.report.benches import environment, milliseconds
from orthoshard.lab.report.content import Section, Table, number, words
from orthoshard.lab.report.fields import Damaged

HEADINGS = ("optimizer", "processes", "predicted, ms", "measured, ms", "predicted / measured", "within the band")


def recognised(found: Mapping[str, Any]) -> bool:
    rows = found.get("rows")
    first: object = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, dict) and {"processes", "predicted_ms", "measured_ms"} <= first.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Raises ``Damaged``."""
    made: list[Any] = []
    said: dict[str, str] = {}
    for row in fields.tables(found, "rows"):
        processes, measured = fields.real(row, "processes"), fields.real(row, "measured_ms")
        if measured <= 0:
            raise Damaged("a measured time is not above 0")
        said[f"{processes:.0f} processes"] = fields.text(row, "machine", "")
        made.append(
            (
                words(fields.text(row, "optimizer")),
                number(processes, "{:.0f}".format),
                number(fields.real(row, "predicted_ms"), milliseconds),
                number(measured, milliseconds),
                number(fields.real(row, "predicted_ms") / measured, "{:.2f}".format),
                words("yes" if row.get("within") else "no"),
            )
        )
    table = Table("One optimizer step, predicted beside measured", HEADINGS, tuple(made))
    facts = (*environment(found), *said.items())
    title = f"Check of the plan: {fields.text(found, 'model')}"
    return Section(title, "check", (source,), tuple((term, text) for term, text in facts if text), tables=(table,))
