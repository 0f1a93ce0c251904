"""The JSON of `orthoshard bench --growth` and `--stages`: a step as models grow, and where its time goes.

May import this room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoshard.lab.report import fields
from orthoshard.lab.report.content import Axis, Cell, Chart, Line, Section, Series, Table, number, words


def recognised(found: Mapping[str, Any]) -> bool:
    return {"growth", "points", "rule", "torch"} <= found.keys()


def section(found: dict[str, Any], source: str, facts: tuple[tuple[str, str], ...]) -> Section:
    """Raises ``Damaged``."""
    along, anchor = fields.text(found, "growth"), fields.text(found, "anchor")
    points = fields.tables(found, "points")
    headings = (along, "GFLOP", "GB moved", "predicted, ms", "measured, ms", "measured / predicted")
    rows = [
        (
            words(fields.text(point, "point") + (" *" if point["point"] == anchor else "")),
            number(fields.real(point, "flops") / 1e9, "{:.3g}".format),
            number(fields.real(point, "bytes") / 1e9, "{:.3g}".format),
            number(fields.real(point, "predicted_ms"), "{:.4g}".format),
            number(fields.real(point, "measured_ms"), "{:.4g}".format),
            number(fields.real(point, "measured_over_predicted"), "{:.2f}".format),
        )
        for point in points
    ]
    x = [fields.real(point, "value") for point in points]
    series = tuple(
        Series(
            what,
            {"a step": Line({"value": x}, [fields.real(point, f"{what}_ms") for point in points], what == "measured")},
        )
        for what in ("predicted", "measured")
    )
    rank = f" at rank {found['rank']}" if found.get("rank") else ""
    title = f"Benchmark: {fields.text(found, 'rule')}{rank} as {fields.text(found, 'model')} grows in {along}"
    chart = Chart(
        "Measured beside predicted", (Axis("value", along, log=True),), ("a step",), "milliseconds", series, log=True
    )
    table = Table(f"One step against {along}", headings, tuple(rows), "*: rates are taken from this point")
    return Section(title, "bench", (source,), facts, (chart,), (table,))


def stages(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each stage of each contestant."""
    made: list[tuple[Cell, ...]] = []
    for label, row in rows.items():
        for stage, spent in fields.table(dict(row), "stages").items():
            entry = fields.table({stage: spent}, stage)
            made.append(
                (
                    words(label),
                    words(stage),
                    number(fields.real(entry, "median_ms"), "{:.3g}".format),
                    number(fields.real(entry, "share"), "{:.1%}".format),
                )
            )
    return Table(
        "Where the time of a step goes", ("optimizer", "stage", "median, ms", "share of the step"), tuple(made)
    )
