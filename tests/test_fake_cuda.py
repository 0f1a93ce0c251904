"""Whole steps on CUDA tensors without a GPU: torch's fake tensors have no numbers, so that any read of one raises, and
every copy between host and device is seen. Needs a torch built for CUDA; a GPU is not touched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from orthoshard import RuleOptimizer

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch built for CUDA")

RULES = {
    "dion": {"rule": "dion"},
    "dion, columns": {"rule": "dion", "q_side": "columns"},
    "dion, Nesterov": {"rule": "dion", "error_feedback": False, "nesterov": True},
    "dion_tail": {"rule": "dion_tail"},
    "muon": {"rule": "muon"},
    "normuon": {"rule": "normuon"},
    "dion3": {"rule": "dion3"},
    "row_norm": {"rule": "row_norm"},
    "adamw": {"rule": "adamw"},
    "lion": {"rule": "lion"},
    "dion, nanochat's stages": {"rule": "dion", "equilibrate": "rows", "row_moment": 0.95, "frobenius": True},
    "dion_tail, cautious": {"rule": "dion_tail", "decay": "cautious"},
    "dion, blocks": {"rule": "dion", "view": "rows:64,64"},
    "dion, stochastic": {"rule": "dion", "rounding": "stochastic"},
}


class Moves(TorchDispatchMode):
    """Counts copies from one kind of device to another. torch has no fake form of its fused kernels, nor of a sum of
    products into another dtype, which read nothing: they are left out."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_fused_" in str(function) or "baddbmm.dtype" in str(function):
            return (kwargs or {}).get("out")
        out = function(*args, **(kwargs or {}))
        given = {x.device.type for x in args if isinstance(x, torch.Tensor) and x.ndim}
        if isinstance(out, torch.Tensor) and out.ndim and given and out.device.type not in given:
            self.seen[str(function)] += 1
        return out


@pytest.fixture(autouse=True)
def _an_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_capturable_step_reads_and_moves_nothing(rule, dtype):
    options = RULES[rule]
    with FakeTensorMode(), torch.device("cuda"):
        weights = [nn.Parameter(torch.zeros(128, 96, dtype=dtype)) for _ in range(3)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = RuleOptimizer([{"params": weights, **options}], capturable=True, kernels="torch")
        optimizer.initialize_state()  # the first step, on empty state, asks whether the rate is zero
        with Moves():  # and sends the keys of stochastic rounding
            optimizer.step()
        with Moves() as moves:
            optimizer.step()
    assert not moves.seen


@pytest.mark.parametrize("rule", RULES)
def test_an_eager_step_looks_at_gradients_and_at_orthonormal_columns_alone(rule, monkeypatch):
    """With these two answered, nothing else of it reads."""
    from orthoshard.engine import step as steps
    from orthoshard.linalg import cholesky, dependent

    looks = Counter()

    def numbers(x, ordinary):
        looks["columns"] += 1
        return [ordinary] * len(x)

    monkeypatch.setattr(steps, "largest_gradients", lambda gradients: [1.0] * len(gradients))
    monkeypatch.setattr(dependent, "host_numbers", numbers)
    monkeypatch.setattr(cholesky, "all_zero", lambda passes: True)
    options = RULES[rule]
    with FakeTensorMode(), torch.device("cuda"), Moves():
        weights = [nn.Parameter(torch.zeros(128, 96)) for _ in range(3)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = RuleOptimizer([{"params": weights, **options}], kernels="torch")
        for _ in range(2):
            optimizer.step()
    orthonormalizations = {"dion": 1, "dion_tail": 2}.get(options["rule"], 0)
    assert (looks["columns"] > 0) == (orthonormalizations > 0)
    assert looks["columns"] <= 2 * 2 * orthonormalizations  # two steps, at most two parts of a view
