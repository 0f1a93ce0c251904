"""The data of the page's calculator: the models, the machines, the contestants, and the constants of its formulas, all
from the planner. Its arithmetic is templates/calculator.js.

May import ``orthoshard.planner``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from orthoshard.planner import estimate, hardware
from orthoshard.planner.contestants import contestants
from orthoshard.report import even, models, temporaries

# Of the columns in templates/form.js.
HEADINGS = (
    *("optimizer step", "added to a step", "days", "cost", "optimizer state", "temporaries"),
    *("products", "passes", "inside the node", "between nodes", "gradients averaged"),
)

EXAMPLE = Fraction(1, 4)

# Llama-3-405B as the README plans it; sizes of the mesh and the denominator of the rank as powers of two.
START = {
    "model": "llama3-405b",
    "machine": "h100",
    "dp": 4,
    "fsdp": 6,
    "tp": 3,
    "rank": 2,
    "tokens_per_step": 16,
    "tokens": 15000,
    "utilization": 40,
    "price": 2,
}


def constants() -> dict[str, Any]:
    """By the names that the formulas give them."""
    return {
        **{name: getattr(even, name) for name in ("FLOAT", "HALF", "DOUBLE", "STEPS", "GRAM_ROUNDS", "FLOPS_PER_BYTE")},
        **{name: dict(getattr(even, name)) for name in ("PASSES", "TOUCHES", "WRITES", "SURVEYED")},
        **{name: getattr(temporaries, name) for name in ("IN_FLIGHT", "BUCKET")},
        "DAY": estimate.DAY,
    }


# What the library does not do.
FORMULAS = (
    ("Muon, every rank all matrices", even.Row("muon", replicas="repeat", form="redundant")),
    ("Muon, distributed Gram", even.Row("muon", replicas="repeat", form="gram")),
)


def rows(dp: int) -> list[dict[str, Any]]:
    """The contestants of a plan with so many replicas: the fields of `even.Row`, a label in which {rank} stands for the
    rank that is chosen, and whether the library works so."""
    known = [
        (one.name.replace(str(EXAMPLE), "{rank}"), True, even.Row(one.row.rule, one.row.rank, one.row.replicas))
        for one in contestants({"dp": dp}, [EXAMPLE])
    ]
    formulas = [(label, False, row) for label, row in FORMULAS]
    found = [*known[:1], *formulas, *known[1:]]
    return [{"label": label, "implemented": implemented, **asdict(row)} for label, implemented, row in found]


def machines() -> list[dict[str, Any]]:
    found = [hardware.find(name) for name in hardware.catalogue()]
    return [
        {"name": each.name, "title": each.name, "about": each.about, "words": each.words, **asdict(each.machine)}
        for each in found
    ]


def calculator() -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "constants": constants(),
        "models": models.load(),
        "machines": machines(),
        "alone": rows(dp=1),
        "replicas": rows(dp=2),
    }


def started(plain: dict[str, Any], plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The calculator with the machine of a plan, and the settings with which it opens: the plan's, as far as a slider
    has them."""
    machine, job = plan["machine"], plan["job"]
    known = {entry["name"] for entry in plain["models"]}
    if machine["name"] not in {entry["name"] for entry in plain["machines"]}:
        plain = plain | {"machines": [*plain["machines"], machine]}
    sizes = {axis: plan["mesh"].get(axis, 1) for axis in ("dp", "fsdp", "tp")}
    start = {
        "model": plan["name"] if plan["name"] in known else START["model"],
        "machine": machine["name"],
        "tokens_per_step": f"{job['tokens_per_step'] / 1e6:.10g}",
        "tokens": f"{job['tokens'] / 1e9:.10g}",
        "utilization": f"{100 * job['utilization']:.10g}",
        "price": f"{job['price']:.10g}",
    }
    return plain, START | start | {axis: (size - 1).bit_length() for axis, size in sizes.items()}
