"""Steps that nobody reads, over several processes: `capturable=True` on the layouts of the table, on simulated ranks.

On a CPU nothing is captured, and the same operations run. Equal to one process that looks at its gradients.
"""

from __future__ import annotations

import threading

import pytest
import torch
from table import EXPERT_LAYOUTS, LAYOUTS, NANOCHAT, RULES, cut, local, place, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from orthoshard import RuleOptimizer
from simulate import simulate

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")
within = threading.local()
SHAPE, COUNT, DTYPE = (13, 7), 3, torch.float64
BAD = 1  # the step in which one entry, on one rank, is NaN


@pytest.fixture(autouse=True)
def no_reads(monkeypatch):
    """A number that the host reads within a step is an error."""

    def refusing(name, read):
        def refused(self, *args, **options):
            assert not getattr(within, "step", False), f"Tensor.{name} in a step that nobody reads"
            return read(self, *args, **options)

        return refused

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))


def optimized(case, options, shape=SHAPE):
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    whole, gradients = tensors(shape, COUNT, DTYPE, steps=3)
    parameters = [nn.Parameter(place(w, mesh, case)) for w in whole]
    group = None if case.places else mesh.get_group()
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    return mesh, parameters, gradients, RuleOptimizer(named, process_group=group, capturable=True, **options)


def alone(options, shape):
    whole, gradients = tensors(shape, COUNT, DTYPE, steps=3)
    parameters = [nn.Parameter(w) for w in whole]
    optimizer = RuleOptimizer([(f"w{i}", p) for i, p in enumerate(parameters)], **{**options, "shard_state": "none"})
    for number, each in enumerate(gradients):
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient.clone()
            if number == BAD:
                parameter.grad.view(-1)[0] = torch.nan
        optimizer.step()
    return parameters


def unread(rank, case, options, shape, expected):
    mesh, parameters, gradients, optimizer = optimized(case, options, shape=shape)
    for number, each in enumerate(gradients):
        for parameter, gradient in zip(parameters, each, strict=True):
            gradient = gradient.clone()
            if number == BAD:
                gradient.view(-1)[0] = torch.nan  # of one shard only, where the weights are sharded
            parameter.grad = place(gradient, mesh, case)
        if not number:
            optimizer.warmup_step()
        within.step = True
        optimizer.step()
        within.step = False
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (1, 0)
    at = mesh.get_coordinate()
    for parameter, whole in zip(parameters, expected, strict=True):
        want = cut(whole.detach(), case, at)
        assert (local(parameter) - want).norm() <= 1e-9 * whole.norm()


def pairs():
    """Dion on every layout, the others and stages on some; on the rest they are slow tests."""
    some = ("hsdp 2x2", "fsdp 2, row-wise tp 2")
    for name, options in RULES.items():
        for layout, case in LAYOUTS.items():
            slow = name != "dion 1/2" and layout not in some
            yield pytest.param(options, case, id=f"{name}, {layout}", marks=[pytest.mark.slow] if slow else [])
    yield pytest.param({"rule": "adamw"}, LAYOUTS["hsdp 2x2"], id="adamw")
    yield pytest.param({"rule": "dion_tail", **NANOCHAT}, LAYOUTS["fsdp 2, row-wise tp 2"], id="nanochat")
    yield pytest.param({"rule": "muon", "shard_state": "zero1"}, LAYOUTS["hsdp 2x2"], id="owners")
    yield pytest.param({"rule": "dion", "shard_compute": "dealt"}, LAYOUTS["fsdp x4"], id="dealt")


@pytest.mark.parametrize(("options", "case"), list(pairs()))
def test_matrices(options, case):
    simulate(case.world, unread, case, options, SHAPE, alone(options, SHAPE))


def test_experts():
    case = EXPERT_LAYOUTS["experts 2, rows 2"]
    simulate(case.world, unread, case, RULES["dion 1/2"], (3, 6, 4), alone(RULES["dion 1/2"], (3, 6, 4)))


def uneven(rank, case):
    _, parameters, gradients, optimizer = optimized(case, {"rule": "dion"})
    for parameter, gradient in zip(parameters[rank:], gradients[0], strict=False):
        parameter.grad = gradient
    with pytest.raises(RuntimeError, match="'w0' has one on some ranks only"):
        optimizer.warmup_step()
    assert all(torch.equal(local(p), w) for p, w in zip(parameters, tensors(SHAPE, COUNT, DTYPE)[0], strict=True))


def test_a_gradient_on_some_ranks_only_is_refused_on_all():
    simulate(2, uneven, LAYOUTS["ddp x2"])


def unprepared(rank, case):
    _, parameters, gradients, optimizer = optimized(case, {"rule": "dion"})
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    with pytest.raises(RuntimeError, match="has not been prepared"):
        optimizer.step()
    optimizer.warmup_step()
    optimizer.step()
    parameters[1].grad = None
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="other gradients than when it was prepared"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    optimizer.warmup_step()
    optimizer.step()


def misplaced(rank, case):
    mesh, parameters, gradients, optimizer = optimized(case, {"rule": "dion"})
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = place(gradient, mesh, case)
    optimizer.warmup_step()
    parameters[0].grad = DTensor.from_local(gradients[0][0] / 2, mesh, [Partial()], run_check=False)
    before = [local(p).clone() for p in parameters]
    with pytest.raises(RuntimeError, match="a gradient that is not placed as its parameter"):
        optimizer.step()
    assert all(torch.equal(local(p), old) for p, old in zip(parameters, before, strict=True))


def test_a_gradient_that_is_placed_otherwise_later_is_refused():
    simulate(2, misplaced, LAYOUTS["replicated x2"])


def test_who_has_a_gradient_is_agreed_on_before():
    simulate(2, unprepared, LAYOUTS["ddp x2"])
