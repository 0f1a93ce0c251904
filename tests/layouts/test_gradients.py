"""Gradients missing on some ranks, on all, in turn, or not finite on one: no hang, no difference, one meaning.

The oracle is one process: a gradient absent everywhere leaves its parameter alone; absent somewhere it counts as zero
there; not finite anywhere skips the whole step.
"""

from __future__ import annotations

import pytest
import torch
from processes import run_processes
from simulate import simulate
from table import LAYOUTS, Case, cut, local, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from orthoshard import Dion, RuleOptimizer

SHAPES = [(8, 6), (8, 6), (5, 9), (8, 6), (7,), (3, 4)]
RULES = [("dion", {}), ("dion", {}), ("muon", {}), ("dion", {}), ("adamw", {}), ("lion", {})]
STEPS = 4


def pattern(seed, world):
    """For each step and parameter, what each rank has: a gradient, none, or one with a bad entry."""
    generator = torch.Generator().manual_seed(seed)
    plan = []
    for _ in range(STEPS):
        everywhere = torch.rand(len(SHAPES), generator=generator) < 0.25
        absent = torch.rand(len(SHAPES), world, generator=generator) < 0.3
        absent |= everywhere[:, None]
        bad = torch.rand(len(SHAPES), world, generator=generator) < 0.01
        plan.append((absent, bad & ~absent))
    return plan


def gradient(seed, step, i):
    generator = torch.Generator().manual_seed(1000 * seed + 10 * step + i)
    return torch.randn(SHAPES[i], generator=generator, dtype=torch.float64)


def groups(parameters):
    return [
        {"params": [(f"w{i}", p)], "rule": rule, "lr": 0.1, **options}
        for i, (p, (rule, options)) in enumerate(zip(parameters, RULES, strict=True))
    ]


def start():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def placed(tensor, mesh, case):
    """As the table places matrices; vectors follow along dim 0."""
    return place(tensor, mesh, vector_case(tensor, case))


def cut_run(rank, case, seeds):
    """All seeds on one rank; returns what went wrong, in words."""
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    coordinates = mesh.get_coordinate()
    wrong = []
    for seed in seeds:
        plan = pattern(seed, case.world)
        whole = [nn.Parameter(w) for w in start()]
        reference = RuleOptimizer(groups(whole))
        parameters = [nn.Parameter(placed(w, mesh, case)) for w in start()]
        group = None if case.places else mesh.get_group()
        optimizer = RuleOptimizer(groups(parameters), process_group=group)
        for step, (absent, bad) in enumerate(plan):
            for i, (p, w) in enumerate(zip(parameters, whole, strict=True)):
                full = gradient(seed, step, i)
                mine = placed(full, mesh, case)
                if case.places:
                    # what each rank holds is its own piece: zero it where that rank has none
                    expected = full.clone()
                    for other in range(case.world):
                        if absent[i, other]:
                            at = (torch.arange(case.world).view(case.mesh) == other).nonzero()[0].tolist()
                            zero_piece(expected, case, at)
                else:
                    expected = full
                p.grad = None if absent[i, rank] else mine
                piece = local(mine)
                if bad[i, rank] and p.grad is not None and piece.numel():
                    piece.view(-1)[0] = torch.nan
                sizes = [piece_size(full, case, other) for other in range(case.world)]
                if any(b and n for b, n in zip(bad[i].tolist(), sizes, strict=True)):
                    expected = full * torch.nan
                w.grad = None if bool(absent[i].all()) else expected
            optimizer.step()
            reference.step()
        if optimizer.skipped_steps != reference.skipped_steps:
            wrong.append(f"seed {seed}: skipped {optimizer.skipped_steps}, not {reference.skipped_steps}")
        for i, (p, w) in enumerate(zip(parameters, whole, strict=True)):
            want = local(placed(w.detach(), mesh, case))
            if not torch.allclose(local(p), want, rtol=0, atol=1e-9):
                wrong.append(f"seed {seed}, rank {rank} at {coordinates}: w{i} is off")
    return wrong


def vector_case(tensor, case):
    if tensor.ndim > 1:
        return case
    return Case(case.mesh, case.places, tuple((axis, 0) for axis, dim in case.order if dim == 0))


def piece_size(tensor, case, rank):
    at = (torch.arange(case.world).view(case.mesh) == rank).nonzero()[0].tolist()
    return cut(tensor, vector_case(tensor, case), at).numel()


def zero_piece(tensor, case, at):
    view = tensor
    for axis, dim in vector_case(tensor, case).order:
        chunks = view.chunk(case.mesh[axis], dim)
        view = chunks[at[axis]] if at[axis] < len(chunks) else view.narrow(dim, 0, 0)
    view.zero_()


CASES = {name: LAYOUTS[name] for name in ("fsdp x2", "fsdp x3", "fsdp x4")}


@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
@pytest.mark.parametrize("name", CASES)
def test_random_patterns_under_fsdp_on_simulated_ranks(name, block):
    """3 x 10 x 20 patterns of four steps."""
    case = CASES[name]
    for wrong in simulate(case.world, cut_run, case, range(20 * block, 20 * block + 20)):
        assert not wrong, wrong


def ddp_run(rank, world, seeds):
    """Replicas whose gradients are absent or bad here and there: a gradient that is absent on some counts as zero
    there, and all go on with the mean, as one process does with that mean. Returns the weights, for a comparison to
    the bit."""
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for seed in seeds:
        parameters = [nn.Parameter(w) for w in start()]
        whole = [nn.Parameter(w) for w in start()]
        optimizer = RuleOptimizer(groups(parameters), process_group=mesh.get_group())
        reference = RuleOptimizer(groups(whole))
        for step, (absent, bad) in enumerate(pattern(seed, world)):
            for i, (p, w) in enumerate(zip(parameters, whole, strict=True)):
                p.grad = None if absent[i, rank] else gradient(seed, step, i)
                if bad[i, rank]:
                    p.grad.view(-1)[0] = torch.inf
                there = int((~absent[i]).sum())
                w.grad = gradient(seed, step, i) * (torch.nan if bad[i].any() else there / world) if there else None
            optimizer.step()
            reference.step()
        assert optimizer.skipped_steps == reference.skipped_steps
        for p, w in zip(parameters, whole, strict=True):
            assert torch.allclose(p, w, rtol=0, atol=1e-9)
        state = [value.flatten() for p in parameters for value in optimizer.state[p].values()]
        results.append(torch.cat([*(p.detach().flatten() for p in parameters), *state]).tolist())
    return results


@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 4))])
@pytest.mark.parametrize("world", [2, 3])
def test_replicas_stay_equal_to_the_bit_on_simulated_ranks(world, block):
    """2 x 4 x 50 patterns."""
    first, *others = simulate(world, ddp_run, world, range(50 * block, 50 * block + 50))
    for other in others:
        assert first == other


def test_random_patterns_with_real_processes():
    """50 patterns on gloo with a 10 s timeout: 30 under FSDP, 20 under DDP."""
    case = CASES["fsdp x3"]
    sharded, replicated = run_processes(
        3, [(cut_run, (case, range(30))), (ddp_run, (3, range(20)))], timeout=120, group_timeout=10
    )
    assert sharded == [[], [], []]
    assert isinstance(replicated[0], list), replicated[0]
    for other in replicated[1:]:
        assert replicated[0] == other


def alone(rank, name, dtype=torch.float32):
    """A gradient, of this dtype, that exists on rank 0 alone."""
    mesh = init_device_mesh("cpu", (2,))
    case = LAYOUTS[name]
    p = nn.Parameter(place(torch.ones(4, 4), mesh, case))
    optimizer = Dion([("w", p)])
    p.grad_dtype = None
    p.grad = place(torch.eye(4, dtype=dtype), mesh, case) if rank == 0 else None
    optimizer.step()
    return local(p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("replica_sync", ["gradients", "factors"])
def test_replicas_with_gradients_of_their_own_need_not_know_their_dtype(replica_sync, dtype):
    first, second = simulate(2, own_alone, replica_sync, dtype)
    assert torch.equal(first, second)
    assert (first - 1).abs().max() > 1e-3


def own_alone(rank, replica_sync, dtype):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Dion([("w", p)], replica_sync=replica_sync, process_group=mesh)
    p.grad_dtype = None
    p.grad = torch.eye(4, dtype=dtype) if rank == 0 else None
    optimizer.step()
    return p.detach()


def test_a_gradient_of_one_shard_alone_moves_its_rows():
    for rank, piece in enumerate(simulate(2, alone, "fsdp x2")):
        moved = (piece - 1).abs().max() > 1e-3
        assert moved == (rank == 0), "the other rank's rows have a zero gradient, so that they only decay"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gradient_of_one_replica_alone_moves_all_replicas_alike(dtype):
    """Of any dtype, which the others, who have none, cannot know."""
    first, second = simulate(2, alone, "replicated x2", dtype)
    assert torch.equal(first, second)
    assert (first - 1).abs().max() > 1e-3


def sparse_somewhere(rank):
    """One rank has a gradient that the optimizer cannot take."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Dion([("w", p)], process_group=mesh.get_group())
    p.grad = torch.eye(4).to_sparse() if rank == 0 else torch.eye(4)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 4))
    return str(caught.value)


def test_a_gradient_that_one_rank_refuses_is_an_error_on_all():
    first, second = simulate(2, sparse_somewhere)
    assert "sparse" in first
    assert "another rank" in second
