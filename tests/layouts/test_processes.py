"""The layout table with real gloo processes, the same jobs that the simulation runs; and torch's own shardings."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from table import EXPERT_LAYOUTS, LAYOUTS, RULES, errors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from orthoshard import Dion, Muon

WORLDS = (2, 3, 4, 8)
CHOSEN = {"dion 1/2": (13, 7), "dion full": (3, 10), "dion columns": (24, 5), "muon": (13, 7)}


@pytest.mark.parametrize("world", WORLDS)
def test_the_table(world):
    """Every layout of this many ranks, each rule on one shape; the jobs of one world share their processes."""
    names, jobs = [], []
    for table, shapes in ((LAYOUTS, CHOSEN), (EXPERT_LAYOUTS, dict.fromkeys(("dion 1/2", "muon"), (3, 6, 4)))):
        for layout, case in table.items():
            if case.world == world:
                for rule, shape in shapes.items():
                    names.append(f"{rule}, {layout}, {shape}")
                    jobs.append((errors, (case, RULES[rule], shape, 3, torch.float64)))
    assert len(jobs) >= 8
    for name, results in zip(names, run_processes(world, jobs), strict=True):
        for result in results:
            assert result == [], f"{name}: {result}"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 20, bias=False, dtype=torch.float64)
        self.down = nn.Linear(20, 8, bias=False, dtype=torch.float64)
        self.norm = nn.LayerNorm(8, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def learn(model, optimizer, steps=5):
    for step in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()


SHARDINGS = {
    "fsdp x2": ((2,), ("fsdp",)),
    "fsdp x4": ((4,), ("fsdp",)),
    "tp x2": ((2,), ("tp",)),
    "hsdp 2x2": ((2, 2), ("replicas", "fsdp")),
    "fsdp 2 on tp 2": ((2, 2), ("fsdp", "tp")),
    "replicas 2, fsdp 2, tp 2": ((2, 2, 2), ("replicas", "fsdp", "tp")),
    "dp and cp flattened": ((2, 2), ("dp", "cp")),
}


def sharded_by_torch(rank, shape, names, rule):
    """A model cut by parallelize_module and fully_shard; returns the largest difference to the whole run."""
    model = Block()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tp" in names:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if names == ("dp", "cp"):
        fully_shard(model, mesh=mesh._flatten("dp_cp"))
    elif "replicas" in names:
        fully_shard(model, mesh=mesh["replicas", "fsdp"])
    elif "fsdp" in names:
        fully_shard(model, mesh=mesh["fsdp"])
    optimizer = rule(model, lr=0.05)
    learn(model, optimizer)
    whole = Block()
    learn(whole, rule(whole, lr=0.05))
    reference = dict(whole.named_parameters())
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).sub(reference[name]).abs().max().item()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("world", [2, 4, 8])
def test_models_sharded_by_torch_itself(world):
    chosen = {
        f"{rule.__name__}, {name}": (sharded_by_torch, (*how, rule))
        for rule in (Dion, Muon)
        for name, how in SHARDINGS.items()
        if torch.tensor(how[0]).prod() == world
    }
    for name, results in zip(chosen, run_processes(world, list(chosen.values())), strict=True):
        for result in results:
            assert isinstance(result, dict), f"{name}: {result}"
            assert max(result.values()) < 1e-9, f"{name}: {result}"


def ddp(rank, rule, explicit):
    model = Block()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = rule(model, lr=0.05, process_group=dist.group.WORLD) if explicit else rule(wrapped, lr=0.05)
    learn(wrapped, optimizer)
    whole = Block()
    learn(whole, rule(whole, lr=0.05))
    difference = max((p - q).abs().max().item() for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    return difference, optimizer.explain()


def test_ddp_by_group_or_by_the_wrapped_model():
    for explicit in (True, False):
        for rule in (Dion, Muon):
            (results,) = run_processes(2, [(ddp, (rule, explicit))])
            for difference, table in results:
                assert difference < 1e-9
                assert "replicas replicas=2" in table


def several_meshes(rank):
    """Two meshes and plain tensors in one optimizer, and a stage without any matrix."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = nn.ModuleDict({"on_a": Block(), "on_b": Block(), "plain": Block()})
    fully_shard(model["on_a"], mesh=mesh["a"])
    fully_shard(model["on_b"], mesh=mesh["b"])
    optimizer = Dion(model, lr=0.05)
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        sum(block(x).pow(2).sum() for block in model.values()).backward()
        optimizer.step()
    whole = nn.ModuleDict({"on_a": Block(), "on_b": Block(), "plain": Block()})
    other = Dion(whole, lr=0.05)
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        other.zero_grad()
        sum(block(x).pow(2).sum() for block in whole.values()).backward()
        other.step()
    reference = dict(whole.named_parameters())
    difference = max(
        (p.full_tensor() if hasattr(p, "full_tensor") else p).sub(reference[name]).abs().max().item()
        for name, p in model.named_parameters()
    )
    stage = nn.LayerNorm(8)
    fully_shard(stage, mesh=mesh["a"])
    last = Dion(stage)
    stage(torch.ones(2, 8)).sum().backward()
    last.step()
    return difference


def test_several_meshes_and_plain_tensors_in_one_optimizer():
    (results,) = run_processes(4, [(several_meshes, ())])
    for result in results:
        assert isinstance(result, float), result
        assert result < 1e-9
