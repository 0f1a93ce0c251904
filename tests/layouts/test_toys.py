"""A direction and a stage that only this test knows: they run on every layout, are explained, planned and saved.

So nothing in the library has to know the name of a new one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from table import LAYOUTS, RULES, SHAPES
from test_layouts import check
from torch import nn

from orthoshard import RuleOptimizer
from orthoshard.budget import step_cost
from orthoshard.directions import Direction, Proposal, Sum
from orthoshard.rules import RULES as ALL
from orthoshard.rules import MatrixRuleType, register
from orthoshard.slots import Slot
from orthoshard.stages import STAGES, Stage, register_stage


@dataclass(frozen=True)
class RankOne(Direction):
    """U = u vᵀ: the sums of rows and of columns of N, at length 1."""

    linear: ClassVar[bool] = False
    withholds: ClassVar[bool] = False

    sign: float = 1.0

    def propose(self, seen, state, shape):
        X = seen.formed()
        u = yield Sum(X.sum(2, keepdim=True), over="columns")
        v = yield Sum(X.sum(1, keepdim=True), over="rows")
        of_u = yield Sum(u.square().sum(1, keepdim=True), over="rows")
        of_v = yield Sum(v.square().sum(2, keepdim=True), over="columns")
        return Proposal(self.sign * u / of_u.sqrt(), (v / of_v.sqrt()).mT)


@dataclass(frozen=True)
class Damp(Stage):
    """U over 1 + the number of steps, which is its state."""

    order: ClassVar[int] = 35

    damp: bool = False

    @property
    def on(self):
        return self.damp

    def slots(self, shape, kept):
        return {"damped": Slot((), torch.float32)}

    def normalize(self, proposal, batch):
        count = batch.state["damped"].add_(1)
        proposal.scale_rows(1 / count.view(-1, 1, 1).to(batch.weights[0].dtype))
        return
        yield


@pytest.fixture(autouse=True)
def toys():
    stages, rules = [*STAGES], dict(ALL)
    register(MatrixRuleType("rank_one", RankOne, {}))
    register_stage(Damp)
    yield
    STAGES[:] = stages
    ALL.clear()
    ALL.update(rules)


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_a_toy_direction_and_a_toy_stage_on_every_layout(case):
    check(case, {"rule": "rank_one", "damp": True}, SHAPES["prime"], torch.float64)


@pytest.mark.parametrize("rule", ["dion 1/2", "dion_tail 1/4", "muon"])
def test_the_toy_stage_with_other_directions(rule):
    check(LAYOUTS["replicas 2, fsdp 2, tp 2"], {**RULES[rule], "damp": True}, SHAPES["prime"], torch.float64)


def test_they_are_explained_counted_and_saved():
    weights = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
    optimizer = RuleOptimizer(weights, rule="rank_one", damp=True, nesterov=True)
    for weight in weights:
        weight.grad = torch.randn(8, 6)
    optimizer.step()
    assert "2 8×6 under rank_one" in optimizer.explain()
    assert step_cost(optimizer.plan(), optimizer.param_groups).state == 2 * 4 * (8 * 6 + 1)
    saved = copy.deepcopy(optimizer.state_dict())
    again = RuleOptimizer(weights, rule="rank_one", damp=True, nesterov=True)
    again.load_state_dict(saved)
    assert all(float(held["damped"]) == 1 for held in again.state.values())
    other = RuleOptimizer(weights, rule="rank_one")
    with pytest.raises(ValueError, match="saved with damp=True, and has False here"):
        other.load_state_dict(saved)
