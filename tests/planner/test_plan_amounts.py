"""The arithmetic of a row by hand, and what a plan is counted for."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
from torch import nn

from orthoshard.groups import complete
from orthoshard.lab.plan.contestants import contestants
from orthoshard.lab.plan.count import counted
from orthoshard.lab.plan.estimate import DAY, Amounts, Job, Machine, cost, days, links, times
from orthoshard.lab.plan.subject import subject
from orthoshard.layout import Axis
from orthoshard.owners import next_owner, split_counts
from orthoshard.plan import build_plan


def test_amounts_are_those_of_the_rule():
    """The closed formulas of one (m, n) matrix on one process, against the step run dry."""
    m, n = 512, 256
    r, layer = n // 4, nn.Linear(n, m, bias=False, device="meta")
    parameters = {"params": [layer.weight], "param_names": ["weight"]}
    low_rank = {"rank_fraction": 0.25}
    for options, products, rest in (  # orthonormalizations in at most four passes, where the host does not look
        ({"rule": "muon"}, 2 * 4 * m * n**2, 28 * n**3),
        ({"rule": "dion", **low_rank}, 8 * m * n * r, 4 * 4 * n * r**2 + 60 * r**3),
        ({"rule": "dion_tail", **low_rank}, 6 * m * n * r, 4 * 4 * (m + n) * r**2 + 120 * r**3),
    ):
        groups = [complete(dict(parameters), {"seed": 0, **options})]
        found = counted(build_plan(groups), groups, 1)
        assert found.here == found.mean
        assert products < found.here.flops <= products + rest, options
        assert found.messages == ()
        rank = 0 if options["rule"] == "muon" else r
        assert found.here.state == 4 * (m * n + m * rank), options


def test_dealt_and_automatic_are_rows_of_their_own():
    names = [row.name for row in contestants({"dp": 2, "fsdp": 4}, [Fraction(1, 16)])]
    assert names[-3:] == ["DionTail 1/16", "DionTail 1/16, state at owners", "DionTail 1/16, dealt"]
    assert not [row for row in contestants({"dp": 2}, [Fraction(1, 16)]) if row.row.shards == "dealt"]


def test_a_step_by_hand():
    machine = Machine(polar=1e12, factors=5e11, memory=1e10, intra=1e9, inter=1e8, per_node=2, peak=2e12, capacity=1e9)
    job = Job(active=1e9, ranks=8, tokens_per_step=1e3, tokens=1e9, utilization=0.5, price=2.0)
    spent = times(
        Amounts("factors", 1e10, 1e9, 2e9, {"tp": 1e9, "dp": 1e8}, {"dp": 5e7}, 0.0, 0.0),
        [("dp", 4), ("tp", 2)],
        machine,
        job,
    )
    assert spent.products == 0.1  # memory takes longer than 1e10 / 5e11
    assert spent.passes == 0.2
    assert (spent.intra, spent.inter, spent.sync) == (1.0, 1.0, 0.5)
    assert spent.model == 6e12 / (8 * 1e12)
    assert spent.overhead == pytest.approx(2.8 / 0.75)
    assert days(spent.step, job) == pytest.approx(1e6 * 3.55 / DAY)
    assert cost(10.0, job) == 10 * 24 * 8 * 2


def test_the_innermost_axes_fill_a_node():
    mesh = [("dp", 2), ("fsdp", 8), ("tp", 4)]
    assert links(mesh, 4) == {"dp": "inter", "fsdp": "inter", "tp": "intra"}
    assert links(mesh, 32) == {"dp": "inter", "fsdp": "intra", "tp": "intra"}
    assert links(mesh, 16)["fsdp"] == "inter", "an axis that does not fit counts as between nodes"


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_no_rank_gets_every_remainder(batch):
    """Batches of a few matrices, dealt out along three axes one after the other: even in the end."""
    sizes, rounds = (2, 4, 2), 48
    owned = []
    for coordinates in product(*map(range, sizes)):
        axes = [Axis((i,), "abc"[i], size, at) for i, (size, at) in enumerate(zip(sizes, coordinates, strict=True))]
        total = 0
        for number in range(rounds):
            own, first = batch, number * batch
            for axis in axes:
                own, first = split_counts(own, axis.size, first)[axis.coordinate], next_owner(first, axis)
            total += own
        owned.append(total)
    assert owned == [rounds * batch // 16] * 16


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("mixtral-8x22b", 39), ("llama3-8b", 8.03)]
)
def test_active_parameters_are_the_published_ones(name, billions):
    assert subject(name).active / 1e9 == pytest.approx(billions, rel=0.03)
    assert math.isfinite(subject(name).active)
