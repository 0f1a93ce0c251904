"""Nothing of the caller's context reaches a step: every rule under each, to the bit of the step outside."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from orthoshard import Dion, DionTail, Muon, RuleOptimizer, clip_grad_norm_


class Narrow(TorchFunctionMode):
    """Somebody's mode, which makes every product and every new tensor float16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        narrow = func.__name__ in ("bmm", "matmul", "baddbmm_", "zeros", "empty", "randn", "tensor", "full")
        return result.half() if narrow and result.is_floating_point() else result


@contextmanager
def setting(change, back):
    """A setting of the whole process, for a while."""
    change()
    try:
        yield
    finally:
        back()


def default_dtype(dtype):
    return lambda: setting(lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(torch.float32))


def matmul_precision(name):
    return lambda: setting(
        lambda: torch.set_float32_matmul_precision(name), lambda: torch.set_float32_matmul_precision("highest")
    )


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: setting(
        lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)
    ),
    "with a device": lambda: torch.device("meta"),
    "a function mode": Narrow,
    "inference mode": torch.inference_mode,
    "default float64": default_dtype(torch.float64),
    "default bfloat16": default_dtype(torch.bfloat16),
    "deterministic": lambda: setting(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "high": matmul_precision("high"),
    "medium": matmul_precision("medium"),
}
RULES = {
    "dion": (Dion, {}),
    "dion, rows": (Dion, {"q_side": "columns", "error_feedback": False}),
    "dion, narrow": (Dion, {"matmul_precision": "bfloat16", "state_dtype": "bfloat16"}),
    "dion, captured": (Dion, {"capturable": True}),
    "dion_tail": (DionTail, {}),
    "muon": (Muon, {}),
    "muon, Gram": (Muon, {"polar": "polar_express", "polar_method": "gram", "nesterov": False}),
    "lion": (RuleOptimizer, {"rule": "lion"}),
    "adamw": (RuleOptimizer, {"rule": "adamw", "weight_decay": 0.1}),
}
WEIGHTS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
}


def trained(kind, options, dtype, context):
    """Steps within the context, the second by a new optimizer that has loaded the first's state, and one outside: all
    that is left of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 40), nn.LayerNorm(40)).to(dtype)
    net[1].weight.data = net[1].weight.data.T.contiguous().T  # stored the other way round
    gradients = [[torch.randn(p.shape).to(dtype) for p in net.parameters()] for _ in range(3)]

    def step(optimizer, number):
        for parameter, gradient in zip(net.parameters(), gradients[number], strict=True):
            parameter.grad = gradient
        optimizer.step()

    def made():
        return kind(net if kind is not RuleOptimizer else net.named_parameters(), lr=0.02, **options)

    with context():
        first = made()
        step(first, 0)
        optimizer = made()
        optimizer.load_state_dict(first.state_dict())
        step(optimizer, 1)
    step(optimizer, 2)
    assert optimizer.skipped_steps == 0
    state = [value for held in optimizer.state.values() for value in held.values()]
    return [*net.parameters(), *state, *deepcopy(optimizer).param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("rule", "weights"),
    [*((rule, "float32") for rule in RULES), *((r, "stochastic") for r in ("dion", "adamw")), ("lion", "bfloat16")],
)
def test_nothing_of_the_callers_context_reaches_a_step(rule, weights):
    (kind, options), (dtype, more) = RULES[rule], WEIGHTS[weights]
    options = {**options, **more}
    expected = trained(kind, options, dtype, nullcontext)

    def same(name, x, y):
        if (x.dtype, x.device, x.is_inference()) != (y.dtype, y.device, False):
            return False
        if name == "medium":  # torch takes another library for its products then: float32, but not the same bits
            return torch.allclose(x, y, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)
        return torch.equal(x, y)

    for name, context in CONTEXTS.items():
        found = trained(kind, options, dtype, context)
        assert all(same(name, x, y) for x, y in zip(found, expected, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_callers_context_reaches_clipping(dtype):
    gradients = [torch.randn(40, 48, generator=torch.Generator().manual_seed(1)).to(dtype), torch.ones(40, dtype=dtype)]

    def clipped(context):
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        with context():
            norm = clip_grad_norm_(parameters, 1.0)
        return [norm, *(parameter.grad for parameter in parameters)]

    expected = clipped(nullcontext)
    for name, context in CONTEXTS.items():
        for x, y in zip(clipped(context), expected, strict=True):
            assert (x.device, x.dtype, x.is_inference()) == (y.device, y.dtype, False), name
            assert torch.equal(x, y), name


def test_a_step_changes_no_setting_of_the_process(monkeypatch):
    """Other threads would see it."""
    names = [name for name in dir(torch._C) if name.startswith(("_set_fp32", "_set_float32", "_set_cublas", "_set_mk"))]
    assert "_set_fp32_precision_setter" in names
    for name in [*names, "_set_deterministic_algorithms"]:
        monkeypatch.setattr(torch._C, name, None)
    for kind, options in RULES.values():
        net = nn.Linear(300, 600)
        optimizer = kind(net.parameters() if kind is RuleOptimizer else net, **options)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_a_closure_keeps_the_callers_context():
    net, seen = nn.Linear(8, 8), []

    def closure():
        loss = net(torch.ones(2, 8)).sum()
        seen.append((net(torch.ones(2, 8)).dtype, torch.zeros(()).dtype, torch.is_grad_enabled()))
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16), Narrow():
        loss = Dion(net).step(closure)
    assert seen == [(torch.bfloat16, torch.float16, True)]
    assert loss.requires_grad


@pytest.mark.parametrize("kind", [Dion, Muon])
def test_parameters_made_in_inference_mode_are_refused_by_name(kind):
    with torch.inference_mode():
        net = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"'weight' was made within torch.inference_mode\(\)"):
        kind(net)
    given = nn.Linear(8, 8)
    optimizer = kind(given)
    given.weight.grad, before = torch.ones(8, 8), given.weight.clone()
    optimizer.param_groups[1]["params"][0] = net.bias  # as hosts replace parameters
    with pytest.raises(ValueError, match="'bias' was made within"):
        optimizer.step()
    assert torch.equal(given.weight, before)
