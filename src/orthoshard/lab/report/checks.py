"""Sections for the JSON of `orthoshard plan --check`: predicted and measured steps.

May import ``orthoshard.lab.plan.tables`` and this room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoshard.lab.plan.tables import CHECK
from orthoshard.lab.report import fields
from orthoshard.lab.report.benches import environment
from orthoshard.lab.report.content import Section, tabulate


def recognised(found: Mapping[str, Any]) -> bool:
    """Return whether this is a result of ``plan --check``."""
    rows = found.get("rows")
    first: object = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, dict) and {"processes", "predicted_ms", "measured_ms"} <= first.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Return the section of a check. Raises ``Damaged``."""
    rows = fields.tables(found, "rows")
    table = tabulate("One optimizer step, predicted beside measured", CHECK, rows)
    said = {f"{fields.real(row, 'processes'):.0f} processes": fields.text(row, "machine", "") for row in rows}
    facts = (*environment(found), *said.items())
    title = f"Check of the plan: {fields.text(found, 'model')}"
    return Section(title, "check", (source,), tuple((term, text) for term, text in facts if text), tables=(table,))
