"""Directions and stages that only this test and docs/architecture.md know: they run on every layout, are explained,
planned, timed and saved.

So nothing in the library has to know the name of a new one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from table import EXPERT_LAYOUTS, EXPERT_SHAPES, LAYOUTS, RULES, SHAPES, in_turn
from test_layouts import check
from torch import nn

from orthoshard import RuleOptimizer
from orthoshard.budget import step_cost
from orthoshard.directions import Direction, Proposal, Sum
from orthoshard.lab.bench.contestants import all_contestants, choose, rules_alone
from orthoshard.lab.plan.cli import main as plan_main
from orthoshard.lab.train.optimizers import plugged_in
from orthoshard.rules import RULES as ALL
from orthoshard.rules import MatrixRuleType, register
from orthoshard.slots import Slot
from orthoshard.stages import STAGES, Stage, register_stage

PAGE = (Path(__file__).parents[2] / "docs/architecture.md").read_text()


@dataclass(frozen=True)
class RankOne(Direction):
    """U = u vᵀ: the sums of rows and of columns of N, at length 1."""

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


@pytest.fixture(autouse=True)
def toys():
    stages, rules = [*STAGES], dict(ALL)
    register(MatrixRuleType("rank_one", RankOne, {}))
    register_stage(Damp)
    # columns and clip
    exec(PAGE.split("## Adding a direction")[1].split("```python\n")[1].split("```")[0], {})
    yield
    STAGES[:] = stages
    ALL.clear()
    ALL.update(rules)


TOYS = {
    "rank_one": {"rule": "rank_one", "damp": True},
    "columns": {"rule": "columns", "clip": 1.5, "equilibrate": "rows"},
}


@pytest.mark.parametrize(("options", "case"), in_turn(TOYS, LAYOUTS, 2))
def test_toys_on_every_layout(options, case):
    check(case, options, SHAPES["prime"], torch.float64)


DEALT = {"equilibrate": "both", "shard_compute": "dealt"}


@pytest.mark.parametrize(
    ("rule", "more"), [("dion 1/2", {}), ("dion 1/2", DEALT), ("dion_tail 1/4", {}), ("muon", {}), ("dion3 1/4", {})]
)
def test_toy_stages_with_other_directions(rule, more):
    options = {**RULES[rule], **more, "damp": True, "clip": 1.5}
    check(LAYOUTS["replicas 2, fsdp 2, tp 2"], options, SHAPES["prime"], torch.float64)


def test_the_state_of_a_toy_stage_is_cut_as_its_experts_are():
    check(EXPERT_LAYOUTS["experts x2"], {"rule": "rank_one", "damp": True}, EXPERT_SHAPES["experts"], torch.float64)


@pytest.mark.parametrize("rule", ["dion", "dion3", "dion_tail"])
def test_error_feedback_takes_out_what_the_direction_captured_whatever_a_stage_makes_of_it(rule):
    """The momentum after a step is the same with and without clipping, and the weights are those of clipped entries."""
    G, moved, momentum = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0)).double(), {}, {}
    for clip in (0.0, 1.5):
        weight = nn.Parameter(G[1].clone())
        optimizer = RuleOptimizer([weight], rule=rule, clip=clip, weight_decay=0.0, lr=1.0, scale="none")
        weight.grad = G[0].clone()
        optimizer.record_diagnostics()
        optimizer.step()
        moved[clip], momentum[clip] = G[1] - weight.detach(), optimizer.state[weight]["momentum"]
        (figures,) = optimizer.diagnostics().values()
        assert figures.update_rms == pytest.approx(float(moved[clip].square().mean().sqrt()), rel=1e-6)
    most = 1.5 * moved[0.0].square().mean().sqrt()
    assert torch.allclose(moved[1.5], moved[0.0].clamp(-most, most), rtol=0, atol=1e-12)
    assert torch.allclose(momentum[1.5], momentum[0.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["dion", "dion_tail"])
def test_a_stage_gives_other_entries_to_what_is_kept_in_fewer_bits(rule):
    weight, G = nn.Parameter(torch.zeros(12, 9)), torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    optimizer = RuleOptimizer([weight], rule=rule, clip=1.5, weight_decay=0.0, state_dtype="bfloat16")
    weight.grad = G
    optimizer.step()
    assert 1.2 < float(weight.detach().abs().max() / weight.detach().square().mean().sqrt()) < 2


def test_the_commands_know_them(capsys):
    """As after ``--plugin``, which imports what registers them, be they made of our own directions."""
    register(MatrixRuleType("my_dion", ALL["dion"].direction, {"nesterov": True}))
    assert plugged_in() == ["rank_one", "columns", "my_dion"]
    assert {"columns", "my_dion-1/4"} < {row.name for row in choose(rules_alone(all_contestants(["1/4"])), [])}
    (row,) = choose(all_contestants([]), ["columns"])
    weights = [nn.Parameter(torch.randn(8, 6))]
    weights[0].grad = torch.randn(8, 6)
    row.optimizer(weights).step()
    assert plan_main(["--model", "nano", "--mesh", "fsdp=2", "--ranks", "1/4"]) == 0
    assert "columns" in capsys.readouterr().out


def test_what_is_none_is_refused():
    class Bare(Stage):
        bare: float = 0.0

    with pytest.raises(TypeError, match="Bare is no stage"):
        register_stage(Bare)
    with pytest.raises(
        ValueError, match="'toy' has a default of 'clap', which neither its direction nor a stage reads"
    ):
        MatrixRuleType("toy", RankOne, {"clap": 1.5})

    @dataclass(frozen=True)
    class Silent(Direction):
        def propose(self, seen, state, shape):
            yield from seen.row_squares()

    register(MatrixRuleType("silent", Silent, {}))
    weight = nn.Parameter(torch.randn(8, 6))
    weight.grad = torch.randn(8, 6)
    with pytest.raises(TypeError, match=r"Silent\.propose returned None: let it return a Proposal"):
        RuleOptimizer([weight], rule="silent").step()


def test_they_are_explained_counted_and_saved():
    weights = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
    optimizer = RuleOptimizer(weights, rule="rank_one", damp=True, nesterov=True)
    for weight in weights:
        weight.grad = torch.randn(8, 6)
    optimizer.record_diagnostics()
    optimizer.step()
    assert all(figures.effective_rank > 1 for figures in optimizer.diagnostics().values())
    assert "2 8×6 under rank_one" in optimizer.explain()
    assert step_cost(optimizer.plan(), optimizer.param_groups).state == 2 * 4 * (8 * 6 + 1)
    saved = copy.deepcopy(optimizer.state_dict())
    again = RuleOptimizer(weights, rule="rank_one", damp=True, nesterov=True)
    again.load_state_dict(saved)
    assert all(float(held["damped"]) == 1 for held in again.state.values())
    other = RuleOptimizer(weights, rule="rank_one")
    with pytest.raises(ValueError, match="saved with damp=True, and has False here"):
        other.load_state_dict(saved)
