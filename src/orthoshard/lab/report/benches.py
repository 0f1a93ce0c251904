"""Sections for the JSON of `orthoshard bench`: one process, sharded matrices, owners of state, slow links, stages.

May import ``orthoshard.lab.bench.tables``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoshard.lab.bench.tables import BOUND_BY, LINK, NAME, OWNERS, SHARDED, named, steps
from orthoshard.lab.report import fields
from orthoshard.lab.report.content import Axis, Chart, Line, Section, Series, Table, tabulate
from orthoshard.lab.report.fields import Damaged
from orthoshard.lab.tables import Column

STAGES = (
    NAME,
    Column("stage", "stage", words=True),
    Column("median, ms", "median_ms", "{:.3g}".format),
    Column("share of the step", "share", "{:.1%}".format),
)
BAND = Axis("mbit", "bandwidth of each replica, Mbit/s", log=True)


def recognised(found: Mapping[str, Any]) -> bool:
    """Return whether this is a result of bench."""
    return {"contestants", "model", "torch"} <= found.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Return the section of a result of bench. Raises ``Damaged``."""
    rows = fields.table(found, "contestants")
    if not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise Damaged("'contestants' is not a table of tables")
    model = found["model"]
    name = fields.text(model, "name") if isinstance(model, dict) else str(model)
    charts: tuple[Chart, ...] = ()
    if "bandwidths_mbit" in found:
        what, charts = "replicas over a slow link", (_link_chart(rows),)
        points = [{**row, **point} for row in named(rows) for point in fields.tables(row, "points")]
        table = tabulate("One optimizer step over a slow link", LINK, points, BOUND_BY)
    elif "replicas" in found:
        what = f"{fields.real(found, 'replicas'):.0f} replicas, without and with owners of state"
        table = tabulate("One optimizer step, the most of any replica", OWNERS, named(rows))
    elif "processes" in found:
        what = f"cut over {fields.real(found, 'processes'):.0f} processes"
        table = tabulate("One optimizer step, every matrix cut by rows", SHARDED, named(rows))
    else:
        what = f"{fields.text(found, 'device')}, {fields.text(found, 'dtype')}"
        table = _stages(rows) if "within" in found else _steps(rows)
    facts = environment(found)
    return Section(f"Benchmark: one step of {name}, {what}", "bench", (source,), facts, charts, (table,))


def environment(about: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return machine, date and command as facts, from the output of `bench.environment.describe`."""
    words = [
        *(str(about[key]) for key in ("gpu", "cpu", "system") if about.get(key)),
        *(f"{about[key]} {key if about[key] != 1 else key[:-1]}" for key in ("cores", "threads") if about.get(key)),
        *([f"torch {about['torch']}"] if about.get("torch") else []),
    ]
    facts = [("machine", ", ".join(words)), *((key, about.get(key)) for key in ("date", "command"))]
    return tuple((term, str(text)) for term, text in facts if text)


def _steps(rows: dict[str, Any]) -> Table:
    for row in rows.values():
        fields.table(row, "ratios_of_medians")
    note = "Medians of alternating steps in one process."
    return tabulate("One optimizer step", steps(rows.values()), named(rows), note)


def _stages(rows: dict[str, Any]) -> Table:
    """Return a table with a row for each stage of each contestant."""
    made: list[dict[str, Any]] = []
    for row in named(rows):
        stages = fields.table(row, "stages")
        made += [{"name": row["name"], "stage": stage, **fields.table(stages, stage)} for stage in stages]
    return tabulate("Where the time of a step goes", STAGES, made)


def _link_chart(rows: dict[str, Any]) -> Chart:
    found: list[Series] = []
    for label, row in rows.items():
        points = fields.tables(row, "points")
        mbit = [fields.real(point, "mbit") for point in points]
        for what, dots in (("predicted", False), ("measured", True)):
            y = [fields.real(point, f"{what}_ms") / 1e3 for point in points]
            found.append(Series(f"{label}, {what}", {"a step": Line({"mbit": mbit}, y, dots)}))
    return Chart("A step beside what its bytes predict", (BAND,), ("a step",), "seconds", tuple(found), log=True)
