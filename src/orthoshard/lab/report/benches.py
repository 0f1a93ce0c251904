"""The JSON of `orthoshard bench`: one process, matrices cut over processes, owners of state, slow links, stages.

May import ``orthoshard.lab.bench.files``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoshard.lab.bench.files import size
from orthoshard.lab.report import fields
from orthoshard.lab.report.content import Axis, Cell, Chart, Line, Section, Series, Table, number, words
from orthoshard.lab.report.fields import Damaged

BAND = Axis("mbit", "bandwidth of each replica, Mbit/s", log=True)


def recognised(found: Mapping[str, Any]) -> bool:
    return {"contestants", "model", "torch"} <= found.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Raises ``Damaged``."""
    rows = fields.table(found, "contestants")
    if not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise Damaged("'contestants' is not a table of tables")
    model = found["model"]
    name = fields.text(model, "name") if isinstance(model, dict) else str(model)
    charts: tuple[Chart, ...] = ()
    if "bandwidths_mbit" in found:
        what, table, charts = "replicas over a slow link", _link(rows), (_link_chart(rows),)
    elif "replicas" in found:
        what, table = f"{fields.real(found, 'replicas'):.0f} replicas, without and with owners of state", _owners(rows)
    elif "processes" in found:
        what, table = f"cut over {fields.real(found, 'processes'):.0f} processes", _sharded(rows)
    else:
        what = f"{fields.text(found, 'device')}, {fields.text(found, 'dtype')}"
        table = _stages(rows) if "within" in found else _steps(rows)
    facts = environment(found)
    return Section(f"Benchmark: one step of {name}, {what}", "bench", (source,), facts, charts, (table,))


def environment(about: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Machine, date and command, of what `bench.environment.describe` has written."""
    words = [
        *(str(about[key]) for key in ("gpu", "cpu", "system") if about.get(key)),
        *(f"{about[key]} {key if about[key] != 1 else key[:-1]}" for key in ("cores", "threads") if about.get(key)),
        *([f"torch {about['torch']}"] if about.get("torch") else []),
    ]
    facts = [("machine", ", ".join(words)), *((key, about.get(key)) for key in ("date", "command"))]
    return tuple((term, str(text)) for term, text in facts if text)


def _steps(rows: dict[str, Any]) -> Table:
    """Medians of alternating steps, and their ratios."""
    against = list(dict.fromkeys(key for row in rows.values() for key in fields.table(row, "ratios_of_medians")))
    headings = ("optimizer", "median, ms", "shortest, ms", "longest, ms", *(f"over {name}" for name in against))
    headings += ("first step / later", "state")
    made: list[tuple[Cell, ...]] = []
    for label, row in rows.items():
        ratios = fields.table(row, "ratios_of_medians")
        made.append(
            (
                words(label),
                *(number(fields.real(row, key), milliseconds) for key in ("median_ms", "min_ms", "max_ms")),
                *(number(fields.maybe(ratios, name), "{:.2f}".format) for name in against),
                number(fields.maybe(row, "first_over_median"), "{:.2f}".format),
                number(fields.maybe(row, "state_bytes"), size),
            )
        )
    return Table("One optimizer step", headings, tuple(made), "Medians of alternating steps in one process.")


def _stages(rows: dict[str, Any]) -> Table:
    """A row for each stage of each contestant."""
    made: list[tuple[Cell, ...]] = []
    for label, row in rows.items():
        for stage, spent in fields.table(row, "stages").items():
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


def _sharded(rows: dict[str, Any]) -> Table:
    headings = ("optimizer", "one process, ms", "cut, ms", "collectives alone, ms")
    headings += ("cut / (one process + collectives)", "sent by a rank")
    keys = ("one_process_ms", "sharded_ms", "collectives_ms")
    made = [
        (
            words(label),
            *(number(fields.real(row, key), milliseconds) for key in keys),
            number(fields.real(row, "ratio"), "{:.2f}".format),
            number(fields.real(row, "bytes"), size),
        )
        for label, row in rows.items()
    ]
    return Table("One optimizer step, every matrix cut by rows", headings, tuple(made))


def _owners(rows: dict[str, Any]) -> Table:
    kinds = (("ms", ", ms", milliseconds), ("bytes", ", sent by a replica", size), ("state", ", state", size))
    headings = (
        "optimizer",
        *(f"{who}{what}" for _, what, _ in kinds for who in ("all state", "owners")),
        "owners / all",
    )
    made = [
        (
            words(label),
            *(
                number(fields.real(fields.table(row, mode), key), written)
                for key, _, written in kinds
                for mode in ("none", "zero1")
            ),
            number(fields.real(row, "ratio"), "{:.2f}".format),
        )
        for label, row in rows.items()
    ]
    return Table("One optimizer step, the most of any replica", headings, tuple(made))


def _link(rows: dict[str, Any]) -> Table:
    headings = ("optimizer and what is sent", "Mbit/s", "sent by a replica", "predicted, s", "measured, s")
    headings += ("measured / predicted", "bound by")
    made = [
        (
            words(label),
            number(fields.real(point, "mbit"), "{:g}".format),
            number(fields.real(row, "bytes"), size),
            number(fields.real(point, "predicted_ms") / 1e3, "{:.3f}".format),
            number(fields.real(point, "measured_ms") / 1e3, "{:.3f}".format),
            number(fields.real(point, "measured_ms") / fields.real(point, "predicted_ms"), "{:.2f}".format),
            words(fields.text(point, "bound_by")),
        )
        for label, row in rows.items()
        for point in fields.tables(row, "points")
    ]
    return Table("One optimizer step over a slow link", headings, tuple(made))


def _link_chart(rows: dict[str, Any]) -> Chart:
    found: list[Series] = []
    for label, row in rows.items():
        points = fields.tables(row, "points")
        mbit = [fields.real(point, "mbit") for point in points]
        for what, dots in (("predicted", False), ("measured", True)):
            y = [fields.real(point, f"{what}_ms") / 1e3 for point in points]
            found.append(Series(f"{label}, {what}", {"a step": Line({"mbit": mbit}, y, dots)}))
    return Chart("A step beside what its bytes predict", (BAND,), ("a step",), "seconds", tuple(found), log=True)


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
