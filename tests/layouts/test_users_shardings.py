"""Sharded setups in which users' optimizers failed in public; the table with links is in docs/log.md."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from orthoshard import Dion, Muon, RuleOptimizer
from simulate import simulate

MAKE = {"dion": Dion, "muon": Muon, "adamw": lambda model: RuleOptimizer(model, rule="adamw")}


torch.manual_seed(0)  # here, since simulated ranks are threads and share the generator
NET = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 6), nn.Linear(6, 3), nn.Linear(3, 1, bias=False)).double()


def model():
    return copy.deepcopy(NET)


def backward(net, step, rank=0, ranks=1):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    net(x.chunk(ranks)[rank]).square().mean().backward()


def by_ndim(net):
    named = list(net.named_parameters())
    return [
        {"params": [pair for pair in named if pair[1].ndim == 2]},
        {"params": [pair for pair in named if pair[1].ndim < 2], "rule": "adamw"},
    ]


def _moved(rank, rule):
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    parallelize_module(net, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = MAKE[rule](net)
    loss = net(torch.ones(2, 8)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("rule", MAKE)
def test_a_backward_pass_through_tensor_parallel_weights_that_have_moved(rule):
    assert all("modified by an inplace operation" in str(said) for said in simulate(2, _moved, rule))


def _one_row(rank, rule):
    net, whole = model(), model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    cut, dense = (RuleOptimizer(by_ndim(one), rule=rule, lr=0.02) for one in (net, whole))
    for step in range(3):
        backward(net, step, rank, 2)
        backward(whole, step)
        for optimizer in (cut, dense):
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(net.parameters(), whole.parameters(), strict=True)
    return max((mine.full_tensor() - its).abs().max().item() for mine, its in pairs)


@pytest.mark.parametrize("rule", ["dion", "muon"])
def test_matrices_of_one_row_or_column_that_leave_ranks_without_any(rule):
    assert max(simulate(2, _one_row, rule)) < 1e-9


def _scaled(rank):
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer, scaler = Dion(net), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.full_tensor().clone() for parameter in net.parameters()]
    for step in range(2):
        optimizer.zero_grad()
        backward(net, step, rank, 2)
        if step == 0 and rank == 1:
            net[2].weight.grad.to_local().fill_(torch.inf)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = [
            not torch.equal(parameter.full_tensor(), old)
            for parameter, old in zip(net.parameters(), before, strict=True)
        ]
        assert any(moved) == (step == 1)
    return scaler.get_scale()


def test_one_rank_overflows_under_a_gradient_scaler():
    assert simulate(2, _scaled) == [2.0, 2.0]
