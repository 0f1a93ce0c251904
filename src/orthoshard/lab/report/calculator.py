"""The data of the page's calculator: the seconds of a step for each case and machine, by `plan.estimate` from a dry
run. The page only multiplies these by days and prices.

May import ``orthoshard.lab.plan`` and `cases`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Any

from orthoshard.lab.plan import hardware
from orthoshard.lab.plan.estimate import DAY, Job, Machine, Times, model_seconds, times
from orthoshard.lab.report.cases import SECONDS, Case, Row, load

# Headings of the columns in templates/form.js.
HEADINGS = (
    *("optimizer step", "added to a step", "days", "cost", "less than AdamW", "optimizer state", "temporaries"),
    *("products", "passes", "inside the node", "between nodes", "gradients averaged"),
)

# Initial settings: Llama-3-405B, as planned in the README.
START: dict[str, Any] = {
    "case": "llama3-405b, dp=16 × fsdp=64 × tp=8",
    "machine": "h100",
    "fraction": "1/4",
    "tokens_per_step": 16,
    "utilization": 40,
    "days": 130,
    "count": 8192,
    "price": 2,
    "saving": 0,
    "share": 5,
}


def machines() -> list[dict[str, Any]]:
    """Return the machines of the catalogue as plain values."""
    found = [hardware.find(name) for name in hardware.catalogue()]
    return [{"name": each.name, "about": each.about, "words": each.words, **asdict(each.machine)} for each in found]


def calculator(plans: Sequence[Mapping[str, Any]] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the calculator's data as plain values, and its initial settings.

    ``plans`` are plans to add, each with a case, a machine and a job. The last one gives the initial settings.
    """
    known, start = machines(), START
    for plan in plans:
        if plan["machine"]["name"] not in {entry["name"] for entry in known}:
            known.append(dict(plan["machine"]))
    cases = [*(plan["case"] for plan in plans), *load()]
    for plan in plans:
        start = START | _settings(plan)
    titles = [f"{case.title}{', as planned' * bool(case.machine)}" for case in cases]
    made = [_case(case, title, known) for case, title in zip(cases, titles, strict=True)]
    kept = ("name", "about", "words", "capacity")
    return {"cases": made, "machines": [{key: entry[key] for key in kept} for entry in known]}, start


def _settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    case, job = plan["case"], plan["job"]
    machine = _machine(plan["machine"])
    step = model_seconds(machine, Job(**job))
    fractions = [row.fraction for row in case.rows if row.fraction]
    return {
        "case": f"{case.title}, as planned",
        "machine": plan["machine"]["name"],
        "fraction": START["fraction"] if START["fraction"] in fractions or not fractions else fractions[0],
        "tokens_per_step": f"{job['tokens_per_step'] / 1e6:.10g}",
        "utilization": f"{100 * job['utilization']:.10g}",
        "days": f"{job['tokens'] / job['tokens_per_step'] * step / DAY:.6g}",
        "count": f"{job['ranks']:.10g}",
        "price": f"{job['price']:.10g}",
    }


def _machine(entry: Mapping[str, Any]) -> Machine:
    return Machine(**{key: entry[key] for key in Machine.__dataclass_fields__})


def _case(case: Case, title: str, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the data of a case.

    ``per_token`` in it is the seconds of forward and backward for one token on all ranks at each machine's full rate.
    """
    ranks = prod(size for _, size in case.mesh)
    token = Job(case.active, ranks, tokens_per_step=1, tokens=1, utilization=1, price=0)
    return {
        "title": title,
        "source": case.source,
        "parameters": case.parameters,
        "active": case.active,
        "ranks": ranks,
        "per_token": [model_seconds(_machine(entry), token) for entry in known],
        "rows": [
            {
                "name": row.name,
                "fraction": row.fraction,
                "baseline": row.rule == "adamw",
                "memory": row.memory,
                "state": row.amounts.state,
                "temporaries": row.amounts.temporaries,
                "seconds": [_seconds(_times(case, row, entry, token)) for entry in known],
            }
            for row in case.rows
        ],
    }


def _times(case: Case, row: Row, entry: Mapping[str, Any], token: Job) -> Times:
    if row.times is not None and entry["name"] == case.machine:
        return row.times
    return times(row.amounts, case.mesh, _machine(entry), token)


def _seconds(spent: Times) -> dict[str, float]:
    """Return the seconds of all parts except the model, rounded for the page."""
    return {key: float(f"{getattr(spent, key):.6g}") for key in SECONDS if key != "model"}
