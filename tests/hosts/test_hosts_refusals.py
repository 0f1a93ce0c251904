"""Hosts that flatten matrices away are refused with a sentence that says what to do: at construction, or at the first
step where they flatten behind the optimizer's back."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from orthoshard import Dion, RuleOptimizer


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.LayerNorm(4))


def test_fsdp1_itself(one_rank):
    wrapped = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    for given in (wrapped, wrapped.named_parameters(), [{"params": list(wrapped.parameters())}]):
        with pytest.raises(ValueError, match=r"FSDP1 flat parameter.*fully_shard"):
            Dion(given)


def test_fsdp1_that_shows_the_original_parameters(one_rank):
    """With use_orig_params they have their names and, on one rank, their shapes: views into a flat parameter."""
    wrapped = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        Dion(wrapped)


def test_zero_3_by_the_marks_it_leaves():
    """zero.Init empties a parameter and keeps its shape in `ds_shape`, its number in `ds_id`."""
    model = net()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO.*fully_shard"):
        Dion(model)


@pytest.mark.parametrize("roles", [("matrix", "norm", "bias"), ("norm", "bias")])
def test_zero_by_what_it_does_to_groups(roles):
    """It takes the finished optimizer and puts one flat vector into each group, in place of its parameters."""
    model = net()
    optimizer = Dion(model)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        if group["role"] in roles:
            flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
            flat.grad = torch.ones_like(flat)
            group["params"] = [flat]
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO and.*fully_shard"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_flat_tensors_in_the_place_of_matrices():
    """Megatron's distributed optimizer keeps this rank's piece of each parameter, flat."""
    optimizer = Dion(net())
    (matrices,) = [group for group in optimizer.param_groups if group["role"] == "matrix"]
    matrices["params"] = [nn.Parameter(p.detach().flatten()[: p.numel() // 2]) for p in matrices["params"]]
    for p in matrices["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"2 flat tensors.*Megatron's distributed optimizer.*fully_shard"):
        optimizer.step()


def test_flat_tensors_that_adamw_trains():
    optimizer = RuleOptimizer(net(), rule="adamw")
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().flatten()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


class ParallelState:
    """Of megatron.core 0.16, what is asked of it."""

    def __init__(self, size, experts=1):
        self.get_tensor_model_parallel_world_size = lambda: size
        self.get_expert_tensor_parallel_world_size = lambda: experts
        self.model_parallel_is_initialized = lambda: True


def marked():
    """As megatron.core.tensor_parallel marks parameters, those of a column-parallel layer."""
    model = net()
    for parameter in (model[0].weight, model[0].bias):
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1
    return model


@pytest.mark.parametrize(
    ("tp", "etp", "known"), [(1, 1, False), (2, 1, True), (1, 2, True)], ids=["unknown", "tp", "etp"]
)
def test_matrices_that_megatron_cut(tp, etp, known, monkeypatch):
    state = ParallelState(tp, experts=etp)
    state.model_parallel_is_initialized = lambda: known
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    for given in (marked(), list(marked()[0].named_parameters())[:1]):
        with pytest.raises(ValueError, match=r"Megatron's tensor parallelism cut along dimension 0.*from_local"):
            Dion(given)


@pytest.mark.parametrize("state", [ParallelState(1), None], ids=["Megatron", "TransformerEngine"])
def test_matrices_that_are_marked_and_not_cut(state, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    model = marked()
    optimizer = Dion(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
