"""Weights, gradients and state of different dtypes: every rule takes every gradient, and rounds to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthoshard import Dion, RuleOptimizer

STEPS, LR = 3, 0.02
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RULES = {
    "dion": {"rule": "dion"},
    "dion, captured": {"rule": "dion", "capturable": True},
    "dion_tail": {"rule": "dion_tail"},
    "dion_tail, captured": {"rule": "dion_tail", "capturable": True},
    "muon": {"rule": "muon"},
    "adamw": {"rule": "adamw"},
    "adamw, not fused": {"rule": "adamw", "fused": False},
    "adamw, captured": {"rule": "adamw", "capturable": True},
    "lion": {"rule": "lion"},
    "lion, captured": {"rule": "lion", "capturable": True},
}
each_rule = pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())


def matrices(seed, dtype=torch.float32):
    """Two, one of them stored the other way round; every entry between 0.5 and 1.5 in size."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in ((12, 8), (8, 12)):
        values = torch.rand(shape, generator=generator) + 0.5
        found.append((values * torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1)).to(dtype))
    return [found[0], found[1].T.contiguous().T]


def trained(weights, gradients, options):
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = RuleOptimizer([(f"w{i}", p) for i, p in enumerate(parameters)], lr=LR, weight_decay=0.1, **options)
    for step in range(STEPS):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad_dtype = None
            p.grad = g * (1 + step / 2)
        optimizer.step()
    return optimizer, parameters


@each_rule
@pytest.mark.parametrize(("weight", "gradient"), [(w, g) for w in DTYPES for g in DTYPES if w != g])
def test_a_gradient_of_any_dtype_is_taken(options, weight, gradient):
    """As in float64, to the rounding of the weights and of the state."""
    weights, gradients = matrices(0, weight), matrices(1, gradient)
    optimizer, parameters = trained(weights, gradients, options)
    _, exact = trained([w.double() for w in weights], [g.double() for g in gradients], options)
    eps = max(torch.finfo(weight).eps, torch.finfo(torch.float32).eps)
    for w, p, e, g in zip(weights, parameters, exact, gradients, strict=True):
        assert p.dtype == weight
        assert (e - w).abs().max() > LR
        assert (p.double() - e).abs().max() <= STEPS * (eps + 4 * LR * max(eps, torch.finfo(gradient).eps))
        assert p.grad.dtype == gradient
        assert torch.equal(p.grad, g * (1 + (STEPS - 1) / 2)), "gradients are never modified"
        for name, value in optimizer.state[p].items():
            if name != "step":
                narrow = options["rule"] in ("adamw", "lion") and weight != torch.float16
                kept = weight if narrow else torch.promote_types(weight, torch.float32)
                assert value.dtype == kept


@each_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_rounds_to_nearest(options, dtype):
    """0.998 w is w again from some w on: torch's foreach kernels, which round 0.998 itself, would go on for ever."""
    parameters = [nn.Parameter(x) for x in (torch.ones(6, 4, dtype=dtype), torch.ones(4, 6, dtype=dtype).T)]
    optimizer = RuleOptimizer(parameters, lr=LR, weight_decay=0.1, **options)
    expected, steps = torch.ones((), dtype=dtype), 40
    for _ in range(steps):
        expected = (expected.double() * (1 - LR * 0.1)).to(dtype)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in map(torch.detach, parameters):
        assert (p == p[0, 0]).all()
        assert float(p[0, 0]) == pytest.approx(float(expected), abs=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("wrong", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "shape"])
@pytest.mark.parametrize("scalar", ["adamw", "lion"])
def test_what_no_rule_can_take_is_refused_before_anything_moves(scalar, wrong):
    net = nn.Linear(6, 5)
    optimizer = Dion(net, scalar=scalar)
    net.weight.grad, net.bias.grad_dtype = torch.ones(5, 6), None
    if wrong == "shape":
        net.bias.grad = torch.ones(5)
        net.bias.data = torch.ones(4)
    else:
        net.bias.grad = torch.ones(5).to(wrong)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"gradient of 'bias' (is torch\.|has shape \(5,\).*zero_grad)"):
        optimizer.step()
    assert torch.equal(net.weight, before)
    assert optimizer.skipped_steps == 0
