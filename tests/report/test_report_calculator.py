"""The calculator's arithmetic in JavaScript is Python's, on random plans; without a page."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import asdict
from functools import cache

import pytest
from report_engine import Engine

from orthoshard.planner import estimate, hardware
from orthoshard.report import calculator, even, models

MODELS, MACHINES, rows = models.load(), calculator.machines(), cache(calculator.rows)
KEYS = ("rule", "rank", "replicas", "form")


@pytest.fixture(scope="module")
def plan():
    return Engine().plan


def random_input(pick: random.Random):
    model = pick.choice(MODELS)
    mesh = {"dp": 2 ** pick.randrange(7), "fsdp": 2 ** pick.randrange(9), "tp": 2 ** pick.randrange(5)}
    machine = pick.choice(MACHINES)
    job = estimate.Job(
        active=model["active"],
        ranks=mesh["dp"] * mesh["fsdp"] * mesh["tp"],
        tokens_per_step=10 ** pick.uniform(4, 8),
        tokens=10 ** pick.uniform(9, 14),
        utilization=pick.uniform(0.05, 0.7),
        price=pick.uniform(0, 12),
    )
    row = pick.choice(rows(mesh["dp"]))
    rank = 0.5 ** pick.randrange(7) if "{rank}" in row["label"] else 1.0
    return model, mesh, {**row, "rank": rank}, machine, job


def by_python(model, mesh, row, machine, job):
    shape = model["model"]
    kinds = tuple(even.Kind(**kind) for kind in shape["kinds"])
    plain = even.Model(kinds, tuple(shape["scalars"]), shape["tensors"], shape["parameters"])
    amounts = even.amounts(plain, mesh, even.Row(**{key: row[key] for key in KEYS}))
    keys = [field.name for field in dataclasses.fields(estimate.Machine)]
    times = estimate.times(amounts, list(mesh.items()), estimate.Machine(**{key: machine[key] for key in keys}), job)
    days = estimate.days(times.step, job)
    derived = {"optimizer": times.optimizer, "step": times.step, "overhead": times.overhead}
    return {
        "amounts": asdict(amounts),
        "times": asdict(times) | derived,
        "days": days,
        "cost": estimate.cost(days, job),
    }


@pytest.mark.parametrize("seed", range(20))
def test_javascript_is_python(plan, seed):
    pick = random.Random(seed)
    for _ in range(25):
        given = random_input(pick)
        model, mesh, row, machine, job = given
        wanted = by_python(*given)
        got = plan(model["model"], mesh, row, machine, asdict(job))
        for name in ("sent", "synced"):  # there zeros are left out
            got["amounts"][name] = {axis: size for axis, size in got["amounts"][name].items() if size}
        assert got.keys() == wanted.keys() | {"memory", "fits"}
        assert got["days"] == pytest.approx(wanted["days"], rel=1e-12)
        assert got["cost"] == pytest.approx(wanted["cost"], rel=1e-12)
        for part in ("amounts", "times"):
            assert got[part].keys() == wanted[part].keys()
            for key, value in wanted[part].items():
                expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-12)
                assert got[part][key] == expected, (key, row, mesh)


def test_every_contestant_and_machine_is_tried():
    pick = random.Random(0)
    inputs = [random_input(pick) for _ in range(300)]
    assert {row["label"] for _, _, row, _, _ in inputs} == {row["label"] for row in [*rows(1), *rows(2)]}
    assert {machine["name"] for _, _, _, machine, _ in inputs} == set(hardware.catalogue())


@pytest.mark.parametrize("name", ["gpt2", "llama3.2-1b"])
def test_models_are_what_the_planner_sees(name):
    stored = {entry["name"]: entry for entry in models.load()}
    assert stored[name] == json.loads(json.dumps(models.calculator_inputs(name))), "python -m orthoshard.report.models"


def test_every_model_can_be_calculated(plan):
    machine = calculator.machines()[0]
    job = {"active": 1e9, "ranks": 8, "tokens_per_step": 1e6, "tokens": 1e12, "utilization": 0.4, "price": 2}
    for entry in models.load():
        for row in calculator.rows(dp=2):
            found = plan(entry["model"], {"dp": 2, "fsdp": 2, "tp": 2}, row, machine, job)
            assert 0 < found["times"]["optimizer"] < found["times"]["step"], (entry["name"], row["label"])
