"""The choice of kernels: the optimizer's, refused where it cannot be, and the same steps under each."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from passes import DEVICE
from torch import nn

from orthoshard import RuleOptimizer, kernels
from orthoshard.linalg import accumulate as passes

RULES = {
    "Dion": {"rule": "dion", "rank_fraction": 0.5},
    "Dion, Q on the columns": {"rule": "dion", "rank_fraction": 0.5, "q_side": "columns"},
    "Dion without error feedback": {"rule": "dion", "rank_fraction": 0.5, "error_feedback": False},
    "DionTail": {"rule": "dion_tail", "rank_fraction": 0.5},
    "Muon": {"rule": "muon"},
}


def trained(kernel, options, dtype, size=1.0, steps=3):
    generator = torch.Generator().manual_seed(0)

    def random(shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)

    weights = [nn.Parameter(random(shape)) for shape in [(13, 7), (13, 7), (7, 20), (2, 5, 9)]]
    optimizer = RuleOptimizer(weights, lr=0.1, kernels=kernel, **options)
    for _ in range(steps):
        for weight in weights:
            weight.grad = random(weight.shape, size)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("rule", RULES)
def test_the_same_steps_under_either_choice(rule):
    for found, wanted in zip(*(trained(k, RULES[rule], torch.float64) for k in ("triton", "torch")), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_gradients_of_any_size(size):
    for found, wanted in zip(
        *(trained(k, RULES["Dion"], torch.float32, size) for k in ("triton", "torch")), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", ["Dion", "DionTail", "Muon"])
def test_stochastic_rounding_under_either_choice(rule):
    options = RULES[rule] | {"rounding": "stochastic"}
    for found, wanted in zip(*(trained(k, options, torch.bfloat16) for k in ("triton", "torch")), strict=True):
        # equal bits, but for sums whose last bit of float32 differs and what three steps make of that
        assert (found == wanted).float().mean() > 0.9


def test_every_pass_but_single_products_has_a_triton_form():
    from orthoshard.kernels.forms import FORMS
    from orthoshard.linalg.forms import PLAIN

    assert set(PLAIN) - set(FORMS) == {"take_product", "add_product"}


def test_triton_s_forms_take_what_torch_s_take():
    from orthoshard.kernels.forms import FORMS
    from orthoshard.linalg.forms import PLAIN

    for name, form in FORMS.items():
        taken = inspect.signature(form).parameters
        plain = inspect.signature(PLAIN[name]).parameters
        assert list(taken) == list(plain), name
        assert all(taken[key].default == plain[key].default for key in taken), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_capturable_steps_under_triton(rule, dtype):
    """They are those under torch, and one with a bad gradient changes nothing at all."""

    def run(kernel):
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(13, 7, generator=generator).to(DEVICE, dtype)) for _ in range(2)]
        optimizer = RuleOptimizer(weights, lr=0.1, kernels=kernel, capturable=True, **RULES[rule])
        for bad in (False, False, True, False):
            for weight in weights:
                weight.grad = torch.randn(13, 7, generator=generator).to(DEVICE, dtype)
            if bad:
                weights[1].grad[3, 5] = float("nan")
            kept = [x.clone() for x in (*weights, *(x for held in optimizer.state.values() for x in held.values()))]
            optimizer.step()
            after = [*weights, *(x for held in optimizer.state.values() for x in held.values())]
            assert not bad or all(torch.equal(*both) for both in zip(kept, after, strict=True))
        assert optimizer.skipped_steps == 1
        return torch.stack([weight.detach() for weight in weights])

    found, wanted = run("triton"), run("torch")
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="kernels='cuda' is unknown; choose one of 'auto', 'torch', 'triton'"):
        RuleOptimizer([nn.Parameter(torch.ones(2, 2))], kernels="cuda")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'orthoshard\[triton\]'"):
        RuleOptimizer([nn.Parameter(torch.ones(2, 2))], kernels="triton")


def test_a_rank_without_a_matrix_asks_for_no_kernel():
    assert not kernels._on_cuda([], [], 0.9)


def test_a_copy_keeps_the_choice():
    optimizer = RuleOptimizer([nn.Parameter(torch.ones(2, 2))], kernels="torch")
    assert copy.deepcopy(optimizer).kernels == pickle.loads(pickle.dumps(optimizer)).kernels == "torch"


def test_what_kernels_cannot_treat_is_refused_before_anything_changes():
    M, G = torch.ones(1, 4, 4, device=DEVICE), torch.ones(1, 4, 4, device=DEVICE)
    elsewhere = torch.ones(1, 4, 4, device="meta")
    with kernels.using("triton"):
        with pytest.raises(ValueError, match="cannot treat a tensor on meta"):
            passes.accumulate(M, [G, elsewhere])
        with pytest.raises(TypeError, match=r"not torch\.complex64"):
            passes.accumulate(M, [G.to(torch.complex64)])
        with pytest.raises(TypeError, match="round bfloat16 weights to nearest or by"):
            passes.add_scaled([M.bfloat16()], G, 1.0, 1.0, [torch.Tensor.copy_])
    assert (M == 1).all()


OUTSIDE_OF_THE_INTERPRETER = """
import sys
import orthoshard.optimizer
from orthoshard import kernels
print([name for name in sys.modules if name.split(".")[0] == "triton"])
import torch
from orthoshard.linalg.accumulate import accumulate
try:
    with kernels.using("triton"):
        accumulate(torch.ones(1, 4, 4), [torch.ones(1, 4, 4)])
except ValueError as error:
    print(error)
"""


def test_triton_comes_with_the_choice_alone_and_is_for_cuda():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE_OF_THE_INTERPRETER], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    imported, refused = done.stdout.splitlines()
    assert imported == "[]"
    assert refused.startswith("The Triton kernels cannot treat a tensor on cpu: they are compiled for CUDA")
