"""The cases of the calculator: amounts of `orthoshard plan --json` for a model on a mesh. Those in cases.json come with
the library, so that making a page needs no dry run. After a change to the cost of a step, make this file again by

    python -m orthoshard.lab.report.cases

May import ``orthoshard.lab.plan`` and `fields`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from orthoshard.lab.plan.estimate import Amounts, Times
from orthoshard.lab.report import fields
from orthoshard.lab.report.fields import Damaged

FILE = Path(__file__).with_name("cases.json")
CASES = (
    ("gpt2", "dp=8"),
    ("llama3.2-1b", "dp=2,fsdp=8"),
    ("llama3-8b", "dp=4,fsdp=8"),
    ("llama3-8b", "fsdp=64"),
    ("mixtral-8x7b", "dp=2,fsdp=32"),
    ("llama3-70b", "dp=4,fsdp=16,tp=8"),
    ("llama3-405b", "dp=16,fsdp=64,tp=8"),
)
MODEL = ("name", "source", "parameters", "active")
NUMBERS = ("flops", "touched", "passes", "state", "temporaries")
BY_AXIS = ("sent", "synced")
ROW = ("name", "rule", "rank", "memory", "products", *NUMBERS, *BY_AXIS)
SECONDS = tuple(field.name for field in dataclasses.fields(Times))


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Args:
        fraction: its rank fraction as written in its name, or an empty text.
        memory: bytes that a rank needs.
        times: times on the machine of the plan, if there is one.
    """

    name: str
    rule: str
    fraction: str
    memory: float
    amounts: Amounts
    times: Times | None


@dataclass(frozen=True)
class Case:
    """A model on a mesh. ``machine`` is the name of the machine of the plan, if any."""

    name: str
    source: str
    parameters: float
    active: float
    mesh: tuple[tuple[str, int], ...]
    rows: tuple[Row, ...]
    machine: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {' × '.join(f'{axis}={size}' for axis, size in self.mesh) or 'one process'}"


def load() -> list[Case]:
    """Return the cases in cases.json."""
    return [read(found) for found in json.loads(FILE.read_text(encoding="utf-8"))]


def read(found: dict[str, Any]) -> Case:
    """Return the case in the JSON of a plan. Raises ``Damaged``."""
    model, mesh = fields.table(found, "model"), fields.table(found, "mesh")
    sizes = tuple((axis, int(fields.real(mesh, axis))) for axis in mesh)
    if min((size for _, size in sizes), default=1) < 1:
        raise Damaged("a size of its mesh is not above 0")
    machine = fields.text(fields.table(found, "hardware"), "name") if "hardware" in found else ""
    name, source = fields.text(model, "name"), fields.text(model, "source")
    rows = tuple(_row(row, mesh, bool(machine)) for row in fields.tables(found, "rows"))
    return Case(name, source, fields.real(model, "parameters"), fields.real(model, "active"), sizes, rows, machine)


def _row(row: dict[str, Any], mesh: Mapping[str, Any], timed: bool) -> Row:
    numbers = {key: fields.real(row, key) for key in NUMBERS}
    sent, synced = (_by_axis(row, key, mesh) for key in BY_AXIS)
    amounts = Amounts(products=fields.text(row, "products"), sent=sent, synced=synced, **numbers)
    name, fraction = fields.text(row, "name"), str(Fraction(fields.real(row, "rank")).limit_denominator(1000))
    shown = fraction if fraction in name.replace(",", "").split() else ""
    spent = fields.table(row, "seconds") if timed else {}
    times = Times(**{key: fields.real(spent, key) for key in SECONDS}) if timed else None
    return Row(name, fields.text(row, "rule"), shown, fields.real(row, "memory"), amounts, times)


def _by_axis(row: dict[str, Any], key: str, mesh: Mapping[str, Any]) -> dict[str, float]:
    sent = fields.table(row, key)
    if unknown := [axis for axis in sent if axis not in mesh]:
        raise Damaged(f"{key!r} has {unknown[0]!r}, which is no axis of its mesh")
    return {axis: fields.real(sent, axis) for axis in sent}


def planned(model: str, mesh: str) -> dict[str, Any]:
    """Plan a case and return the values to keep. They do not depend on the machine."""
    from orthoshard.lab.plan.cli import PlanConfig, plan

    found = plan(PlanConfig(model, mesh, hardware="b200"))
    described = found.subject.described
    about = (described.name, described.source, found.subject.parameters, found.subject.active)
    rows = [line.plain(found.links) for line in found.lines]
    return {
        "model": dict(zip(MODEL, about, strict=True)),
        "mesh": found.sizes,
        "rows": [{key: row[key] for key in ROW} for row in rows],
    }


def main() -> int:
    """Write cases.json, and return the exit code."""
    made: list[str] = []
    for model, mesh in CASES:
        print(model, mesh, flush=True)
        case = planned(model, mesh)
        rows = ",\n".join(json.dumps(row) for row in case.pop("rows"))
        made.append(f'{json.dumps(case)[:-1]}, "rows": [\n{rows}]}}')
    FILE.write_text("[\n" + ",\n".join(made) + "\n]\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
