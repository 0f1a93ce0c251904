"""Every rule against its oracle: same weights and same state after several steps, in float64 and in float32."""

from __future__ import annotations

import pytest
import torch
from oracles import AdamWOracle, DionOracle, DionTailOracle, LionOracle, MuonOracle
from torch import nn

from orthoshard import RuleOptimizer

SHAPES = [(8, 8), (24, 8), (8, 24), (13, 7), (1, 5), (5, 1), (1, 1)]
# float32 steps differ from float64 by rounding that the orthonormalization amplifies by the condition of its input
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
STEPS = 6


def problem(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]
    steps = [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(STEPS)]
    return weights, steps


def train(optimizer, weights, steps, oracles):
    for gradients in steps:
        for weight, gradient, oracle in zip(weights, gradients, oracles, strict=True):
            weight.grad = gradient.clone()
            oracle.step(gradient)
        optimizer.step()


def assert_equal(weights, oracles, dtype):
    for weight, oracle in zip(weights, oracles, strict=True):
        error = (weight.double() - oracle.W).norm() / oracle.W.norm()
        assert error <= TOLERANCE[dtype], (tuple(weight.shape), error)


# Options that change the mathematics, in the oracles' letters; the others say how it is computed.
LETTERS = {
    "lr": "lr",
    "weight_decay": "wd",
    "momentum": "mu",
    "nesterov": "nesterov",
    "q_side": "side",
    "error_feedback": "feedback",
    "tail_weight": "tail",
    "scale": "convention",
}


def said(options):
    return {LETTERS[key]: value for key, value in options.items() if key in LETTERS}


DION = [
    {"rank_fraction": 0.25},
    {"rank_fraction": 1.0},
    {"rank_fraction": 0.5, "q_side": "columns"},
    {"rank_fraction": 0.5, "error_feedback": False},
    {"rank_fraction": 0.5, "scale": "rms", "weight_decay": 0.3, "lr": 0.1},
    {"rank_fraction": 0.5, "scale": "original", "momentum": 0.5},
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", DION, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_dion(options, dtype):
    weights, steps = problem(SHAPES, dtype)
    optimizer = RuleOptimizer(weights, rule="dion", **options)
    optimizer.initialize_state()
    oracles = [DionOracle(w.data, optimizer.state[w]["Q"], **said(options)) for w in weights]
    train(optimizer, weights, steps, oracles)
    assert_equal(weights, oracles, dtype)
    for weight, oracle in zip(weights, oracles, strict=True):
        state = optimizer.state[weight]
        assert torch.allclose(state["momentum"].double(), oracle.M, rtol=0, atol=TOLERANCE[dtype] * 30)
        overlap = (state["Q"].double() * oracle.Q).sum(0).abs()  # a column's sign is free
        assert torch.allclose(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)


DION_TAIL = [
    {"rank_fraction": 0.25},
    {"rank_fraction": 1.0},
    {"rank_fraction": 0.5, "nesterov": False},
    {"rank_fraction": 0.5, "tail_weight": 0.5, "scale": "rms", "weight_decay": 0.3, "lr": 0.1},
    {"rank_fraction": 0.5, "tail_weight": 0.0, "momentum": 0.5},
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", DION_TAIL, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_dion_tail(options, dtype):
    weights, steps = problem(SHAPES, dtype)
    optimizer = RuleOptimizer(weights, rule="dion_tail", **options)
    optimizer.initialize_state()
    oracles = [DionTailOracle(w.data, optimizer.state[w]["Q"], **said(options)) for w in weights]
    train(optimizer, weights, steps, oracles)
    assert_equal(weights, oracles, dtype)


MUON = [
    {},
    {"nesterov": False},
    {"scale": "spectral", "momentum": 0.8},
    {"scale": "rms", "weight_decay": 0.3, "lr": 0.1},
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", MUON, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_muon(options, dtype):
    weights, steps = problem(SHAPES, dtype)
    optimizer = RuleOptimizer(weights, rule="muon", **options)
    oracles = [MuonOracle(w.data, **said(options)) for w in weights]
    train(optimizer, weights, steps, oracles)
    assert_equal(weights, oracles, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rule", "oracle"), [("adamw", AdamWOracle), ("lion", LionOracle)])
@pytest.mark.parametrize("strided", [False, True])
def test_elementwise(rule, oracle, dtype, strided):
    weights, steps = problem([(4, 6), (5,), (), (2, 3, 4)], dtype)
    if strided:
        weights = [nn.Parameter(w.data.mT.contiguous().mT) if w.ndim > 1 else w for w in weights]
    optimizer = RuleOptimizer(weights, rule=rule, weight_decay=0.1)
    oracles = [oracle(w.data, wd=0.1) for w in weights]
    train(optimizer, weights, steps, oracles)
    assert_equal(weights, oracles, dtype)


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
def test_a_stack_of_experts_equals_its_matrices(rule):
    (stack,), steps = problem([(3, 6, 4)], torch.float64)
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.data]
    whole = RuleOptimizer([stack], rule=rule)
    single = RuleOptimizer(apart, rule=rule)
    whole.initialize_state()
    single.initialize_state()
    for matrix, state in zip(apart, whole.state[stack].get("Q", [None] * 3), strict=True):
        if state is not None:
            single.state[matrix]["Q"].copy_(state)
    for (gradient,) in steps:
        stack.grad = gradient
        for matrix, part in zip(apart, gradient, strict=True):
            matrix.grad = part
        whole.step()
        single.step()
    assert torch.allclose(stack, torch.stack(list(apart)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon", "adamw", "lion"])
def test_strided_weights_and_gradients_equal_contiguous_ones(rule):
    (plain,), steps = problem([(6, 9)], torch.float64)
    strided = nn.Parameter(torch.randn(9, 14, dtype=torch.float64).mT[2:8])
    strided.data.copy_(plain.data)
    assert not strided.is_contiguous()
    a, b = RuleOptimizer([plain], rule=rule), RuleOptimizer([strided], rule=rule)
    for (gradient,) in steps:
        plain.grad, strided.grad = gradient, gradient.mT.contiguous().mT
        a.step()
        b.step()
    assert torch.allclose(plain, strided, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
@pytest.mark.parametrize("exponent", [-37, -20, 20, 37])
def test_the_size_of_the_gradient_does_not_matter(rule, exponent):
    """float32: gradients times 10^±37 give the same weights to rounding; a power of two near it gives the same bits."""
    weights, steps = problem([(16, 12), (12, 16)], torch.float32)
    results = []
    for factor in (1.0, 10.0**exponent):
        copies = [nn.Parameter(w.data.clone()) for w in weights]
        optimizer = RuleOptimizer(copies, rule=rule)
        for gradients in steps:
            for copy, gradient in zip(copies, gradients, strict=True):
                scaled = gradient / 8 * factor  # entries up to 1: 1e37 times that, summed over steps, fits float32
                copy.grad = scaled
            optimizer.step()
        results.append(torch.cat([c.detach().flatten() for c in copies]))
    start = torch.cat([w.detach().flatten() for w in weights])
    moved = (results[0] - start).norm()
    assert moved > 0.1
    # 1e-37 leaves small entries with few bits: float32 has no more than 1e-45 below
    assert (results[0] - results[1]).norm() <= 1e-3 * moved


@pytest.mark.parametrize("rule", ["dion", "dion_tail"])
@pytest.mark.parametrize("rank_fraction", [0.25, 1.0])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_directions_below_noise_do_not_move_the_weights(true_rank, rank_fraction, rule):
    """A gradient of rank k moves the weights in k directions, whatever r is; Q's columns have length 1 but are not
    orthogonal, so that the update's norm may reach sqrt(k)."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(20, 16, generator=generator))
    optimizer = RuleOptimizer([weight], rule=rule, rank_fraction=rank_fraction, lr=0.1, weight_decay=0.0)
    left, right = torch.randn(20, true_rank, generator=generator), torch.randn(true_rank, 16, generator=generator)
    for _ in range(4):
        before = weight.detach().clone()
        weight.grad = left @ right
        optimizer.step()
        moved = torch.linalg.svdvals((weight.detach() - before) / (0.1 * (20 / 16) ** 0.5))
        assert torch.all(moved <= true_rank**0.5 + 1e-3)
        assert int((moved > 1e-3).sum()) == min(true_rank, round(16 * rank_fraction))
        assert torch.isfinite(optimizer.state[weight]["Q"]).all()
        assert torch.all(optimizer.state[weight]["Q"].norm(dim=0) > 0.1), "a dead column cannot come back"


def test_a_starved_expert_comes_back():
    """Zero gradients for some steps, then full ones: the update has full rank again at once."""
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = RuleOptimizer([weight], rule="dion", rank_fraction=1.0, lr=1.0, weight_decay=0.0)
    for step in range(6):
        before = weight.detach().clone()
        gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient if step >= 3 else torch.zeros(16, 16)
        optimizer.step()
        moved = torch.linalg.svdvals(weight.detach() - before)
        assert int((moved > 0.05).sum()) == (16 if step >= 3 else 0)


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
def test_low_precision_state_and_weights(rule):
    """bfloat16 weights and state follow the float64 oracle to a few of their own roundings."""
    weights, steps = problem([(32, 24)], torch.bfloat16)
    weights[0].data.zero_()  # so that the weights are rounded at the size of what they moved by
    exact = [nn.Parameter(w.data.double()) for w in weights]
    low = RuleOptimizer(weights, rule=rule, state_dtype="bfloat16")
    high = RuleOptimizer(exact, rule=rule)
    start = exact[0].detach().clone()
    for (gradient,) in steps:
        weights[0].grad, exact[0].grad = gradient, gradient.double()
        low.step()
        high.step()
    assert low.state[weights[0]]["momentum"].dtype == torch.bfloat16
    moved = (exact[0] - start).norm()
    assert (weights[0].double() - exact[0]).norm() <= 0.1 * moved


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon", "normuon", "dion3", "row_norm"])
@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "captured"])
def test_a_momentum_that_fades_away_is_no_division_by_zero(rule, side, capturable):
    """What an idle expert has after thousands of steps: denormal, whose scales of size and equilibration are large."""
    weights, steps = problem([(16, 12), (12, 16)], torch.float32)
    options = {"rule": rule, "equilibrate": side, "lr": 0.02, "weight_decay": 0.0, "capturable": capturable}
    optimizer = RuleOptimizer([nn.Parameter(w.data.clone()) for w in weights], **options)
    parameters = optimizer.param_groups[0]["params"]
    for factor in (1e-41, 0.0):
        for parameter, gradient in zip(parameters, steps[0], strict=True):
            parameter.grad = gradient * factor
        optimizer.step()
        assert all(torch.isfinite(parameter).all() for parameter in parameters)


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon", "normuon", "dion3", "row_norm", "adamw", "lion"])
def test_a_gradient_whose_momentum_would_overflow_is_skipped(rule, capturable):
    parameter = nn.Parameter(torch.ones(8, 8))
    optimizer = RuleOptimizer([parameter], rule=rule, capturable=capturable)
    for size, skipped in ((1e37, 0), (3e38, 1), (-3e38, 2), (1e37, 2)):
        parameter.grad = torch.full((8, 8), size)
        optimizer.step()
        assert (optimizer.skipped_steps, bool(torch.isfinite(parameter).all())) == (skipped, True)


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "captured"])
def test_lion_decays_narrow_weights_as_wide_ones_in_the_mean(capturable):
    """0.9985 is 1 in bfloat16, and a decay that is a pass of its own did nothing."""
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(64, 64, generator=generator).to(dtype))
        optimizer = RuleOptimizer([parameter], rule="lion", lr=3e-3, weight_decay=0.5, capturable=capturable)
        for _ in range(100):
            parameter.grad = torch.randn(64, 64, generator=generator).to(dtype)
            optimizer.step()
        norms.append(float(parameter.detach().double().norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
