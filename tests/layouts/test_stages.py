"""Stages round directions on every layout, and directions that are dealt to owners: equal to one process, bytes as run
dry."""

from __future__ import annotations

import itertools

import pytest
import torch
from table import EXPERT_LAYOUTS, EXPERT_SHAPES, LAYOUTS, RULES, SHAPES, STAGES, TOLERANCE, in_turn, pairwise
from test_layouts import check

from orthoshard.engine import driver
from orthoshard.rules import RULES as ALL

DIRECTIONS = {n: RULES[n] for n in ("dion 1/2", "dion columns", "dion_tail 1/4", "muon", "dion3 1/4", "nora")}
# One layout of each kind; the slow tests have all.
SOME = ("ddp x2", "fsdp x3", "row-wise tp x2", "replicas 2, fsdp 2, tp 2")


@pytest.mark.parametrize(("direction", "stage", "case"), pairwise(DIRECTIONS, STAGES, {n: LAYOUTS[n] for n in SOME}))
def test_a_stage(direction, stage, case):
    check(case, both(direction, stage), SHAPES["prime"], torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_every_stage(case):
    for direction, stage in itertools.product(DIRECTIONS.values(), STAGES.values()):
        check(case, both(direction, stage), SHAPES["prime"], torch.float64)


def both(direction, stage):
    """What the direction can have of a stage: not every one withholds what error feedback takes."""
    read = ALL[direction["rule"]].options()
    return {**direction, **{key: value for key, value in stage.items() if key in read}}


@pytest.mark.parametrize("shape", EXPERT_SHAPES.values(), ids=EXPERT_SHAPES)
@pytest.mark.parametrize("case", [EXPERT_LAYOUTS["experts 2, rows 2"], EXPERT_LAYOUTS["expert columns x2"]])
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_the_whole_stack_on_experts(direction, case, shape):
    check(case, both(direction, STAGES["nanochat"]), shape, torch.float64)


CUT = {name: case for name, case in LAYOUTS.items() if case.order}


DEALT = {rule: RULES[rule] for rule in ("dion 1/2", "dion columns", "dion_tail 1/4")}


@pytest.mark.parametrize(("options", "case"), in_turn(DEALT, CUT, 2))
def test_dealt(options, case):
    check(case, {**options, "shard_compute": "dealt"}, SHAPES["prime"], torch.float64)


@pytest.mark.parametrize(("options", "case", "formed"), [
    ({"rule": "dion_tail", "rank_fraction": 0.5}, "fsdp x8", True),
    ({"rule": "dion", "rank_fraction": 1.0}, "fsdp x8", True),
    ({"rule": "dion", "rank_fraction": 1.0, "equilibrate": "both"}, "fsdp x8", True),
    ({"rule": "dion", "rank_fraction": 1.0}, "replicas 2, fsdp 2, tp 2", False),
])  # fmt: skip
def test_dealt_brings_back_what_is_less(monkeypatch, options, case, formed):
    """U, and what error feedback takes, where the shards are many; else thin factors."""
    chosen, less = set(), driver._formed_is_less
    monkeypatch.setattr(driver, "_formed_is_less", lambda *args: chosen.add(less(*args)) or less(*args))
    check(LAYOUTS[case], {**options, "shard_compute": "dealt"}, SHAPES["prime"], torch.float64)
    assert chosen == {formed}


def test_dealt_brings_back_what_narrow_factors_make(monkeypatch):
    """State rounds otherwise where sums do: see `test_bfloat16_state_where_a_rank_has_no_column`."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.1)
    options = {"rule": "dion_tail", "rank_fraction": 0.5, "state_dtype": "bfloat16", "shard_compute": "dealt"}
    check(LAYOUTS["fsdp x8"], options, SHAPES["prime"], torch.float32)


@pytest.mark.parametrize("case", [CUT["fsdp x3"], CUT["replicas 2, fsdp 2, tp 2"]])
@pytest.mark.parametrize("direction", ["dion 1/2", "dion_tail 1/4"])
def test_dealt_with_the_whole_stack(direction, case):
    options = {**both(RULES[direction], STAGES["nanochat"]), "shard_compute": "dealt"}
    check(case, options, SHAPES["tall"], torch.float64)
