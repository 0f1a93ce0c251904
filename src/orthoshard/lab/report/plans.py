"""The JSON of `orthoshard plan`: its tables, its advice and assumptions; and what the calculator may begin with.

May import ``orthoshard.lab.plan.estimate``, ``orthoshard.lab.bench.files`` and this room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from orthoshard.lab.bench.files import size
from orthoshard.lab.plan.estimate import Machine
from orthoshard.lab.report import cases, fields
from orthoshard.lab.report.content import Cell, Section, Table, number, words
from orthoshard.lab.report.curves import count
from orthoshard.lab.report.fields import Damaged

JOB = ("active", "ranks", "tokens_per_step", "tokens", "utilization", "price")
MARKS = "‡ does not fit into memory."


def recognised(found: Mapping[str, Any]) -> bool:
    return {"mesh", "hardware", "job", "rows", "assumptions"} <= found.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Raises ``Damaged``."""
    model, hardware, mesh = (fields.table(found, key) for key in ("model", "hardware", "mesh"))
    job = {key: fields.real(fields.table(found, "job"), key) for key in JOB}
    sizes = {axis: int(fields.real(mesh, axis)) for axis in mesh}
    if min(sizes.values(), default=1) < 1 or min(job["tokens_per_step"], job["tokens"], job["utilization"]) <= 0:
        raise Damaged("a size of its mesh, or a setting of its run, is not above 0")
    rows = fields.tables(found, "rows")
    name, where = fields.text(model, "name"), " × ".join(f"{axis}={size}" for axis, size in sizes.items())
    price = f"{job['price']:g} an hour" if job["price"] else "none given"
    return Section(
        f"Plan: {name} on {where or 'one process'}",
        "plan",
        (source,),
        facts=(
            ("model", f"{count(fields.real(model, 'parameters'))} parameters, a token meets {count(job['active'])}"),
            ("hardware", fields.text(hardware, "about")),
            ("tokens", f"{count(job['tokens'])}, {count(job['tokens_per_step'])} a step"),
            ("utilization", f"{job['utilization']:.0%} of the datasheet in forward and backward"),
            ("price of a rank", price),
        ),
        tables=(_times(rows, bool(job["price"])), _amounts(rows)),
        lists=tuple(
            (title, tuple(str(sentence) for sentence in fields.listed(found, key)))
            for title, key in (("Recommendation", "advice"), ("Assumptions", "assumptions"))
        ),
        plan={"case": cases.read(found), "job": job, "machine": _machine(hardware)},
    )


def _name(row: dict[str, Any]) -> Cell:
    return words(fields.text(row, "name") + ("" if row.get("fits", True) else " ‡"))


def _times(rows: list[dict[str, Any]], priced: bool) -> Table:
    keys = ("products", "passes", "intra", "inter", "sync")
    headings = ("optimizer", "optimizer step", "mean of all ranks", "products", "passes", "inside the node")
    made: list[tuple[Cell, ...]] = []
    for row in rows:
        spent = fields.table(row, "seconds")
        cells = [
            number(fields.real(spent, "optimizer"), seconds),
            number(fields.real(fields.table(row, "mean_seconds"), "optimizer"), seconds),
            *(number(fields.real(spent, key), seconds) for key in keys),
            number(fields.real(row, "overhead"), lambda share: f"{100 * share:.3g} %"),
            number(fields.real(row, "days"), "{:,.4g}".format),
            *([number(fields.real(row, "cost"), "{:,.0f}".format)] if priced else []),
        ]
        made.append((_name(row), *cells))
    headings += ("between nodes", "gradients averaged", "added to a step", "days", *(["cost"] if priced else []))
    return Table("Time of a step of the busiest rank, and what it comes to", headings, tuple(made), MARKS)


def _amounts(rows: list[dict[str, Any]]) -> Table:
    headings = ("optimizer", "state", "temporaries", "TFLOP", "memory traffic", "inside the node")
    headings += ("between nodes", "gradients")
    made: list[tuple[Cell, ...]] = []
    for row in rows:
        sent, synced = fields.table(row, "sent_by_link"), fields.table(row, "synced")
        traffic = fields.real(row, "touched") + fields.real(row, "passes")
        cells = [
            *(number(fields.real(row, key), size) for key in ("state", "temporaries")),
            number(fields.real(row, "flops"), lambda flops: f"{flops / 1e12:.3g}"),
            number(traffic, size),
            *(number(fields.real(sent, key), size) for key in ("intra", "inter")),
            number(sum(fields.real(synced, axis) for axis in synced), size),
        ]
        made.append((_name(row), *cells))
    return Table("Of a step, the busiest rank", headings, tuple(made))


def _machine(hardware: dict[str, Any]) -> dict[str, Any]:
    """As the calculator's machines are."""
    name, about = fields.text(hardware, "name"), fields.text(hardware, "about")
    figures = {field.name: fields.real(hardware, field.name) for field in dataclasses.fields(Machine)}
    if min(figures.values()) <= 0:
        raise Damaged("a figure of its hardware is not above 0")
    return {"name": name, "about": about, "words": [fields.text(hardware, "source")], **figures}


def seconds(value: float) -> str:
    if not value:
        return "0"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
