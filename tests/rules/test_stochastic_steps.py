"""Stochastic rounding in a step: its mean, resuming, what is refused, and that nothing changes without it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from orthoshard import RuleOptimizer
from orthoshard.engine.rounding import _keys as keys
from orthoshard.linalg import rounding
from unattended import no_reads

RULES = ["dion", "dion_tail", "muon", "adamw", "lion"]
each_rule = pytest.mark.parametrize("rule", RULES)
LR = {"dion": 2e-3, "dion_tail": 2e-3, "muon": 2e-3, "adamw": 1e-3, "lion": 1e-3}


def start(count: int = 3, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """Weights between 1 and 2, whose neighbours are 1/128 apart."""
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter((1.2 + 0.5 * torch.rand(24, 18, generator=g)).to(dtype)) for _ in range(count)]


def gradients(step: int, like: list[nn.Parameter]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=g).bfloat16().to(p.dtype) for p in like]


def optimizer_of(weights, rule, how="stochastic", **options):
    named = [(f"w{i}", p) for i, p in enumerate(weights)]
    return RuleOptimizer(named, rule=rule, rounding=how, **{"lr": LR[rule], **options})


def run(optimizer, weights, first, last):
    for step in range(first, last):
        for p, g in zip(weights, gradients(step, weights), strict=True):
            p.grad = g
        optimizer.step()


@each_rule
def test_the_mean_is_the_step_in_float32(rule):
    """One step is far below half a unit: to nearest nothing moves; the mean over 200 throws moves as float32 does."""
    exact, nearest, throws = start(), start(), 200
    for p in exact:
        p.data = p.data.float()
    first = torch.cat([p.detach().flatten() for p in exact])
    run(optimizer_of(exact, rule, "nearest"), exact, 0, 1)
    run(optimizer_of(nearest, rule, "nearest"), nearest, 0, 1)
    total = torch.zeros_like(first)
    for throw in range(throws):
        weights = start()
        optimizer = optimizer_of(weights, rule)
        optimizer.param_groups[0]["rounding_steps"] = throw
        run(optimizer, weights, 0, 1)
        total += torch.cat([p.detach().float().flatten() for p in weights])
    wanted = (torch.cat([p.detach().flatten() for p in exact]) - first) * 128
    got = (total / throws - first) * 128
    lost = (torch.cat([p.detach().float().flatten() for p in nearest]) - first) * 128 - wanted
    assert wanted.abs().max() < 1
    z = (got - wanted) / (wanted.abs() * (1 - wanted.abs()) / throws).sqrt().clamp(min=1 / throws)
    assert z.abs().max() < 5.5
    assert z.square().mean() < 1.2
    assert lost.norm() > 2 * (got - wanted).norm()


@each_rule
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy"])
def test_resuming_is_exact(rule, copied):
    weights = start()
    optimizer = optimizer_of(weights, rule)
    run(optimizer, weights, 0, 3)
    if copied == "state_dict":
        others = [nn.Parameter(p.detach().clone()) for p in weights]
        other = optimizer_of(others, rule)
        other.load_state_dict(deepcopy(optimizer.state_dict()))
    else:
        other = deepcopy(optimizer)
        others = other.param_groups[0]["params"]
    run(optimizer, weights, 3, 6)
    run(other, others, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert other.param_groups[0]["rounding_steps"] == 6
    again = start()
    forgetful = optimizer_of(again, rule)
    run(forgetful, again, 0, 3)
    forgetful.param_groups[0]["rounding_steps"] = 0
    run(forgetful, again, 3, 6)
    assert not all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)), "the count matters"


@each_rule
def test_wider_weights_and_the_default_are_what_they_were(rule):
    for dtype, how in ((torch.float32, "stochastic"), (torch.bfloat16, "nearest")):
        runs = []
        for options in ({"how": how}, {"how": "nearest"}):
            weights = start(dtype=dtype)
            optimizer = optimizer_of(weights, rule, **options)
            run(optimizer, weights, 0, 3)
            runs.append(weights)
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_state_is_that_of_the_kernel_itself(rule, monkeypatch):
    """Its moments of one step, in bfloat16, rounded as the kernel rounds them; also a few tensors at a time, and pieces
    of one."""
    states = []
    for how, together in (("nearest", 2**22), ("nearest", 500), ("nearest", 7), ("stochastic", 500), ("stochastic", 7)):
        monkeypatch.setattr(rounding, "TOGETHER", together)
        weights = start()
        optimizer = optimizer_of(weights, rule, how)
        run(optimizer, weights, 0, 1)
        states.append([optimizer.state[p] for p in weights])
    for one, *others in zip(*states, strict=True):
        for name, other in ((name, other) for name in one for other in others):
            assert torch.allclose(one[name].float(), other[name].float(), rtol=2**-7, atol=0), name


def test_skipped_steps_are_not_counted():
    weights = start()
    optimizer = optimizer_of(weights, "muon")
    for p in weights:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.param_groups[0]["rounding_steps"] == 0


def test_float16_and_unknown_roundings_are_refused():
    with pytest.raises(ValueError, match="'w0' is float16"):
        optimizer_of(start(dtype=torch.float16), "muon")
    with pytest.raises(ValueError, match="rounding='up' is unknown"):
        optimizer_of(start(), "muon", "up")


@each_rule
def test_a_captured_step_counts_on_the_device(rule):
    """It takes the steps of a plain one, but for a few entries whose rounding hangs by a bit of the rate, and reads
    nothing; a step that only the device skips is not counted, and changes nothing."""
    weights, captured = start(), start()
    run(optimizer_of(weights, rule), weights, 0, 4)
    optimizer = optimizer_of(captured, rule, capturable=True)
    optimizer.initialize_state()
    with no_reads():
        run(optimizer, captured, 0, 2)
    before = [p.detach().clone() for p in captured]
    for p in captured:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    optimizer.warmup_step()
    assert all(torch.equal(a, b) for a, b in zip(before, captured, strict=True))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["rounding_steps"] == 2
    run(optimizer, captured, 2, 4)
    assert optimizer.param_groups[0]["rounding_steps"].item() == 4
    assert saved["param_groups"][0]["rounding_steps"] == 2
    differ = torch.cat([(a != b).flatten() for a, b in zip(weights, captured, strict=True)])
    assert differ.float().mean() < 0.01
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.param_groups[0]["rounding_steps"], torch.tensor(2))


def test_a_step_that_is_being_captured_has_keys_of_its_own(monkeypatch):
    """Equal to those that are sent, and not in the cache, from which they could vanish while the graph lives."""
    sent = keys(0, ("a", "b"), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [keys(0, ("a", "b"), torch.device("cpu")) for _ in range(2)]
    assert torch.equal(captured[0], sent)
    assert len({sent.data_ptr(), *(each.data_ptr() for each in captured)}) == 3
