"""Sections for the JSON of `orthoshard plan`: its tables, advice and assumptions, and values for the calculator.

May import ``orthoshard.lab.plan`` and this room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from orthoshard.lab.plan.estimate import Machine
from orthoshard.lab.plan.tables import AMOUNTS, NO_ROOM, times
from orthoshard.lab.report import cases, fields
from orthoshard.lab.report.content import Section, tabulate
from orthoshard.lab.report.curves import count
from orthoshard.lab.report.fields import Damaged

JOB = ("active", "ranks", "tokens_per_step", "tokens", "utilization", "price")


def recognised(found: Mapping[str, Any]) -> bool:
    """Return whether this is a plan."""
    return {"mesh", "hardware", "job", "rows", "assumptions"} <= found.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Return the section of a plan. Raises ``Damaged``."""
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
            ("model", f"{count(fields.real(model, 'parameters'))} parameters, {count(job['active'])} active per token"),
            ("hardware", fields.text(hardware, "about")),
            ("tokens", f"{count(job['tokens'])}, {count(job['tokens_per_step'])} a step"),
            ("utilization", f"{job['utilization']:.0%} of the datasheet in forward and backward"),
            ("price of a rank", price),
        ),
        tables=(
            tabulate("Time of a step on the busiest rank, and its cost", times(bool(job["price"])), rows, NO_ROOM),
            tabulate("Amounts of a step on the busiest rank", AMOUNTS, rows),
        ),
        lists=tuple(
            (title, tuple(str(sentence) for sentence in fields.listed(found, key)))
            for title, key in (("Recommendation", "advice"), ("Assumptions", "assumptions"))
        ),
        plan={"case": cases.read(found), "job": job, "machine": _machine(hardware)},
    )


def _machine(hardware: dict[str, Any]) -> dict[str, Any]:
    """Return the hardware of a plan in the form of the calculator's machines. Raises ``Damaged``."""
    name, about = fields.text(hardware, "name"), fields.text(hardware, "about")
    figures = {field.name: fields.real(hardware, field.name) for field in dataclasses.fields(Machine)}
    if min(figures.values()) <= 0:
        raise Damaged("a figure of its hardware is not above 0")
    return {"name": name, "about": about, "words": [fields.text(hardware, "source")], **figures}
