"""Directions with stages round them against the same written plainly: weights and state after several steps."""

from __future__ import annotations

import pytest
import torch
from oracles import DionStep, PolarStep, RowsStep, SelectStep, StackOracle
from test_oracles import SHAPES, TOLERANCE, assert_equal, problem, train

from orthoshard import RuleOptimizer
from orthoshard.directions.proposal import Proposal
from orthoshard.linalg.small import finished
from orthoshard.rules import RULES

# Each direction, its options, and what is the same to the oracle.
DIRECTIONS = {
    "dion": ({"rule": "dion", "rank_fraction": 0.5}, lambda Q: DionStep(Q), {"feedback": True}),
    "dion_tail": (
        {"rule": "dion_tail", "rank_fraction": 0.5}, lambda Q: DionStep(Q, tail=True), {"nesterov": True},
    ),
    "muon": ({"rule": "muon"}, PolarStep, {"nesterov": True, "convention": "original"}),
    "normuon": ({"rule": "normuon"}, PolarStep, {"nesterov": True, "convention": "original", "row_moment": 0.95}),
    "dion3": (
        {"rule": "dion3"}, SelectStep, {"feedback": True, "convention": "original", "row_moment": 0.95},
    ),
    "dion3 1/8": (
        {"rule": "dion3", "fraction": 0.125, "row_moment": 0.0}, lambda Q: SelectStep(Q, 0.125),
        {"feedback": True, "convention": "original"},
    ),
    "row_norm": ({"rule": "row_norm", "lr": 0.02}, RowsStep, {"nesterov": True, "convention": "original"}),
    "nora": (
        {"rule": "row_norm", "tangent": True, "lr": 0.02}, lambda Q: RowsStep(Q, tangent=True),
        {"nesterov": True, "convention": "original"},
    ),
}  # fmt: skip
# Stages, as options and as the oracle's.
STAGES = {
    "none": ({}, {}),
    "heavy ball": ({"nesterov": False, "error_feedback": False}, {"nesterov": False, "feedback": False}),
    "rows": ({"equilibrate": "rows"}, {"equilibrate": "rows"}),
    "columns": ({"equilibrate": "columns"}, {"equilibrate": "columns"}),
    "both": ({"equilibrate": "both"}, {"equilibrate": "both"}),
    "row moment": ({"row_moment": 0.9}, {"row_moment": 0.9}),
    "frobenius": ({"frobenius": True}, {"frobenius": True}),
    "cautious": ({"decay": "cautious", "weight_decay": 0.5}, {"decay": "cautious", "wd": 0.5}),
    "hyperball": ({"decay": "hyperball"}, {"decay": "hyperball"}),
    "floor": ({"update_floor": 0.35}, {"floor": 0.35}),
    "nanochat": (
        {"equilibrate": "rows", "row_moment": 0.95, "frobenius": True, "decay": "cautious"},
        {"equilibrate": "rows", "row_moment": 0.95, "frobenius": True, "decay": "cautious"},
    ),
}


# In float32 what differs is the direction, and the form of the write.
CASES = [
    pytest.param(direction, stage, dtype, id=f"{direction}-{stage}-{dtype}")
    for direction in DIRECTIONS
    for stage, (_, said) in STAGES.items()
    for dtype in TOLERANCE
    if dtype == torch.float64 or not said or "decay" in said
]


@pytest.mark.parametrize(("direction", "stage", "dtype"), CASES)
def test_a_stack(direction, stage, dtype):
    options, make, same = DIRECTIONS[direction]
    more, said = STAGES[stage]
    # A row or column alone is its own direction: nothing there is left to a rounding's choice.
    weights, steps = problem([shape for shape in SHAPES if min(shape) > 1], dtype)
    more = {key: value for key, value in more.items() if key in RULES[options["rule"]].options()}
    optimizer = RuleOptimizer(weights, **{**options, **more})
    optimizer.initialize_state()
    oracles = [StackOracle(w.data, make(optimizer.state[w].get("Q")), **{**same, **said}) for w in weights]
    train(optimizer, weights, steps, oracles)
    assert_equal(weights, oracles, dtype)
    for weight, oracle in zip(weights, oracles, strict=True):
        momentum = optimizer.state[weight]["momentum"].double()
        assert torch.allclose(momentum, oracle.M, rtol=0, atol=30 * TOLERANCE[dtype])


@pytest.mark.parametrize("stage", ["none", "nanochat"])
def test_dion3_of_all_rows_is_normuon(stage):
    weights, steps = problem([(8, 8), (24, 8), (8, 24)], torch.float64)
    others = [torch.nn.Parameter(w.data.clone()) for w in weights]
    all_rows = {"fraction": 1.0, "error_feedback": False, "nesterov": True}
    a = RuleOptimizer(weights, rule="dion3", **all_rows, **STAGES[stage][0])
    b = RuleOptimizer(others, rule="normuon", **STAGES[stage][0])
    for gradients in steps:
        for w, v, g in zip(weights, others, gradients, strict=True):
            w.grad, v.grad = g, g
        a.step()
        b.step()
    assert all(torch.allclose(w, v, rtol=0, atol=1e-12) for w, v in zip(weights, others, strict=True))


def test_equal_rows_are_selected_from_the_first():
    """Ties, and rows that differ only by what float32 cannot tell, whatever their order in memory."""
    weight = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = RuleOptimizer([weight], rule="dion3", weight_decay=0.0, row_moment=0.0)
    weight.grad = torch.ones(8, 12)
    optimizer.step()
    assert (weight.detach().abs().sum(1) > 0).tolist() == [True, True] + [False] * 6


def test_a_floor_is_of_the_update_before_the_rate():
    """0.35 of |W| times the rate, as where it comes from; longer updates are what they are."""
    start = torch.randn(12, 8, dtype=torch.float64)
    for size, wanted in ((10.0, 0.35 * 10), (0.1, 12**0.5)):  # |U| of 12 unit rows is sqrt(12)
        for lr in (0.01, 0.02):
            weight = torch.nn.Parameter(start * (size / start.norm()))
            weight.grad = torch.randn(12, 8, dtype=torch.float64)
            before = weight.detach().clone()
            options = {"scale": "none", "update_floor": 0.35, "weight_decay": 0.0}
            RuleOptimizer([weight], rule="row_norm", lr=lr, **options).step()
            assert float((weight.detach() - before).norm()) == pytest.approx(lr * wanted, rel=1e-9)


@pytest.mark.parametrize("scaled", [False, True], ids=["as it is", "scaled rows"])
def test_row_lengths_of_an_update_are_known_without_forming_it(scaled):
    """Of U = V Rᵀ + diag(d) E, E the part of X beyond R, handed over as factors and X itself."""
    draw = torch.Generator().manual_seed(0)
    X, V, W = (torch.randn(2, 6, n, dtype=torch.float64, generator=draw) for n in (9, 3, 1))
    R = torch.linalg.qr(torch.randn(2, 9, 3, dtype=torch.float64, generator=draw)).Q
    d = W if scaled else torch.ones_like(W)
    beyond = (X - X @ R @ R.mT).square().sum(-1, keepdim=True)
    rows = d if scaled else None
    proposal = Proposal(V - d * (X @ R), R, rows, X, orthonormal="right", basis=V, beyond=beyond)
    assert torch.allclose(finished(proposal.row_squares()), proposal.formed().square().sum(-1, keepdim=True))
