"""The layout table with real gloo processes, the same jobs that the simulation runs; and torch's own shardings."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from blocks import Block, learn, whole
from table import EXPERT_LAYOUTS, LAYOUTS, RULES, errors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from view_table import VIEWS, view_errors

from orthoshard import Dion, Muon, clip_grad_norm_
from orthoshard.engine import meeting
from processes import run_processes

WORLDS = (2, 3, 4, 8)
CHOSEN = {"dion 1/2": (13, 7), "dion full": (3, 10), "dion columns": (24, 5), "muon": (13, 7)}


def tabled(world):
    """Every layout of this many ranks, by the rules in turn, each on its shape."""
    experts = dict.fromkeys(("dion 1/2", "dion_tail 1/4", "muon"), (3, 6, 4))
    for table, shapes in ((LAYOUTS, CHOSEN), (EXPERT_LAYOUTS, experts)):
        for number, (layout, case) in enumerate(table.items()):
            if case.world == world:
                rule, shape = [*shapes.items()][number % len(shapes)]
                yield f"{rule}, {layout}, {shape}", (errors, (case, RULES[rule], shape, 3, torch.float64))


VIEWED = {
    "fsdp x2": "heads",
    "row-wise tp x2": "conv 2-D",
    "fsdp x3": "uneven rows",
    "fsdp x4": "fused Conv1D",
    "fsdp 2 within column-wise tp 2": "interleaved",
    "hsdp 2x2": "heads and less",
    "replicas 2, fsdp 2 within tp 2": "uneven rows",
}


def viewed(rank, layout, view):
    return view_errors(rank, LAYOUTS[layout], VIEWS[view], torch.float64)


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
    learn([model], optimizer, 0, 5)
    reference = Block()
    learn([reference], rule(reference, lr=0.05), 0, 5)
    return differences(model, reference)


class SequenceBlock(Block):
    """Its norm comes first, so that the sequence can be cut where it is applied."""

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def sequence_parallel(rank, rule):
    """Tensor parallelism alone, the sequence cut outside of the matrices: the norm's gradients are unfinished sums."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model, reference = SequenceBlock(), SequenceBlock()
    cut = {"norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=Shard(0))}
    parallelize_module(model, mesh, {**cut, "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False)})
    optimizer, other = rule(model, lr=0.05), rule(reference, lr=0.05)
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for module, given, taker in ((model, distribute_tensor(x, mesh, [Shard(0)]), optimizer), (reference, x, other)):
            taker.zero_grad()
            module(given).pow(2).sum().backward()
        kinds = {str(p.grad.placements) for p in model.norm.parameters()}
        norms = [clip_grad_norm_(module.parameters(), 0.5) for module in (model, reference)]
        assert torch.allclose(*norms, rtol=1e-12, atol=0)
        optimizer.step()
        other.step()
    assert kinds == {"(Partial(sum),)"}
    return differences(model, reference)


def differences(model, reference):
    """The largest difference of each parameter to the one-process model's."""
    expected = whole(reference)
    return {name: p.sub(expected[name]).abs().max().item() for name, p in whole(model).items()}


@pytest.mark.parametrize("world", WORLDS)
def test_the_table_views_and_models_sharded_by_torch_itself(world):
    """All jobs of one world share their processes: starting these takes longer than most jobs."""
    jobs = dict(tabled(world))
    assert len(jobs) >= 3
    for layout, view in VIEWED.items():
        if LAYOUTS[layout].world == world:
            jobs[f"{view}, {layout}"] = (viewed, (layout, view))
    for rule in (Dion, Muon):
        for name, how in [*SHARDINGS.items()][:: 1 if rule is Dion else 2]:
            if torch.tensor(how[0]).prod() == world:
                jobs[f"{rule.__name__}, {name}"] = (sharded_by_torch, (*how, rule))
        if world == 2:
            jobs[f"{rule.__name__}, sequence parallel"] = (sequence_parallel, (rule,))
    for name, results in zip(jobs, run_processes(world, list(jobs.values())), strict=True):
        for result in results:
            if isinstance(result, dict):
                assert max(result.values()) < 1e-9, f"{name}: {result}"
            else:
                assert result == [], f"{name}: {result}"


def ddp(rank, rule, explicit):
    model = Block()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = rule(model, lr=0.05, process_group=dist.group.WORLD) if explicit else rule(wrapped, lr=0.05)
    learn([wrapped], optimizer, 0, 5)
    reference = Block()
    learn([reference], rule(reference, lr=0.05), 0, 5)
    return max(differences(model, reference).values()), optimizer.explain()


def test_ddp_by_group_or_by_the_wrapped_model():
    for results in run_processes(2, [(ddp, (rule, explicit)) for explicit in (True, False) for rule in (Dion, Muon)]):
        for difference, table in results:
            assert difference < 1e-9
            assert "replicas replicas=2" in table


def saves_alone(rank, options):
    """As a host that saves on rank 0; then as a checkpoint on all."""
    meeting.PATIENCE = timedelta(seconds=1)
    net = Block()
    optimizer = Dion(net, process_group=dist.group.WORLD, **options)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) + rank * ("replica_sync" in options)
    optimizer.step()
    refusal = ""
    if rank == 0:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            refusal = str(error)
    dist.barrier()
    return refusal, [sorted(optimizer.state_dict()["state"]) for _ in range(2)]


@pytest.mark.parametrize("options", [{"shard_state": "zero1"}, {"replica_sync": "factors"}])
def test_a_checkpoint_that_one_rank_asks_for_is_refused(options):
    (((refusal, saved), (_, theirs)),) = run_processes(2, [(saves_alone, (options,))])
    assert "call it on every rank" in refusal
    assert saved == theirs == [[*range(len(list(Block().parameters())))]] * 2


def several_meshes(rank):
    """Two meshes and plain tensors in one optimizer, and a stage without any matrix."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = nn.ModuleDict({"on_a": Block(), "on_b": Block(), "plain": Block()})
    fully_shard(model["on_a"], mesh=mesh["a"])
    fully_shard(model["on_b"], mesh=mesh["b"])
    learn(model.values(), Dion(model, lr=0.05), 0, 3)
    reference = nn.ModuleDict({"on_a": Block(), "on_b": Block(), "plain": Block()})
    learn(reference.values(), Dion(reference, lr=0.05), 0, 3)
    stage = nn.LayerNorm(8)
    fully_shard(stage, mesh=mesh["a"])
    last = Dion(stage)
    stage(torch.ones(2, 8)).sum().backward()
    last.step()
    return max(differences(model, reference).values())


def test_several_meshes_and_plain_tensors_in_one_optimizer():
    (results,) = run_processes(4, [(several_meshes, ())])
    for result in results:
        assert isinstance(result, float), result
        assert result < 1e-9
