"""Gradients missing on some ranks, on all, in turn, or not finite on one: no hang, no difference, one meaning.

The oracle is one process: a gradient absent everywhere leaves its parameter alone; absent somewhere it counts as zero
there; not finite anywhere skips the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from first_step import comparison_bytes
from table import LAYOUTS, Case, cut, local, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from orthoshard import Dion, RuleOptimizer, clip_grad_norm_
from orthoshard.budget import agreement_bytes, step_cost
from processes import run_processes
from simulate import simulate

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


def some_of(last, few):
    """The first few seeds, and as slow tests all of them."""
    blocks = (range(first, min(first + 20, last)) for first in range(few, last, 20))
    return [range(few), *(pytest.param(block, marks=pytest.mark.slow) for block in blocks)]


@pytest.mark.parametrize("seeds", some_of(200, 5))
@pytest.mark.parametrize("name", CASES)
def test_random_patterns_under_fsdp_on_simulated_ranks(name, seeds):
    """Patterns of four steps each."""
    case = CASES[name]
    for wrong in simulate(case.world, cut_run, case, seeds):
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


@pytest.mark.parametrize("seeds", some_of(200, 10))
@pytest.mark.parametrize("world", [2, 3])
def test_replicas_stay_equal_to_the_bit_on_simulated_ranks(world, seeds):
    first, *others = simulate(world, ddp_run, world, seeds)
    for other in others:
        assert first == other


@pytest.mark.parametrize("count", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_random_patterns_with_real_processes(count):
    """On gloo with a 10 s timeout, under FSDP and under DDP."""
    jobs = [(cut_run, (CASES["fsdp x3"], range(count))), (ddp_run, (3, range(count)))]
    sharded, replicated = run_processes(3, jobs, timeout=120, group_timeout=10)
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


@dataclass(frozen=True)
class Elsewhere:
    """A parameter whose gradient comes otherwise than it lies.

    case    how the parameter lies
    grad    how its gradient comes; ``order`` as in `Case`
    summed  the axes over which what ranks hold adds up, by hand
    """

    case: Case
    grad: Case
    summed: tuple[int, ...]
    shape: tuple[int, ...]
    rule: str = "dion"


R, S0, S1, SUM, MEAN = Replicate(), Shard(0), Shard(1), Partial(), Partial("avg")
WITHIN = LAYOUTS["fsdp 2 within column-wise tp 2"]
ROWS3 = LAYOUTS["fsdp x3"]
ELSEWHERE = {
    "a norm under sequence parallelism": Elsewhere(Case((2,), (R,), ()), Case((2,), (SUM,), ()), (0,), (7,), "adamw"),
    "a matrix under sequence parallelism": Elsewhere(Case((3,), (R,), ()), Case((3,), (SUM,), ()), (0,), (5, 4)),
    "an embedding cut by rows": Elsewhere(ROWS3, Case((3,), (R,), ()), (), (8, 5), "muon"),
    "rows for columns": Elsewhere(ROWS3, LAYOUTS["fsdp dim 1 x3"], (0,), (5, 7)),
    "cut for whole": Elsewhere(Case((2,), (R,), ()), LAYOUTS["fsdp x2"], (0,), (5, 4), "muon"),
    "a mean, uneven shards": Elsewhere(ROWS3, Case((3,), (MEAN,), ()), (0,), (7, 4), "dion_tail"),
    "hsdp that has not added up": Elsewhere(
        LAYOUTS["hsdp 2x2"], Case((2, 2), (SUM, S0), ((1, 0),)), (0,), (5, 6), "dion_tail"
    ),
    "a sum for strided shards": Elsewhere(WITHIN, Case((2, 2), (SUM, R), ()), (0,), (7, 4), "lion"),
    "left to right for strided shards": Elsewhere(WITHIN, LAYOUTS["left to right 2x2"], (0, 1), (9, 4)),
}


def elsewhere_coordinates(how, rank):
    return (torch.arange(how.case.world).view(how.case.mesh) == rank).nonzero()[0].tolist()


def term(how, whole, rank):
    """What one rank has of the gradient: its piece, or its term of a sum."""
    at = elsewhere_coordinates(how, rank)
    for axis, placement in enumerate(how.grad.places):
        if isinstance(placement, Partial):
            size = how.grad.mesh[axis]
            shares = torch.arange(1.0, size + 1, dtype=torch.float64)
            whole = whole * shares[at[axis]] / shares.sum() * (size if placement == MEAN else 1)
    return cut(whole, how.grad, at)


def elsewhere_whole(how, whole, absent=()):
    """The gradient that ranks make together, where some have none: written entry by entry, by flat indices."""
    numbers = torch.arange(whole.numel()).view(whole.shape)
    made = torch.zeros_like(whole)
    for rank in range(how.case.world):
        at = elsewhere_coordinates(how, rank)
        total = torch.zeros(whole.numel(), dtype=whole.dtype)
        for other in range(how.case.world):
            there = elsewhere_coordinates(how, other)
            if other not in absent and all(i in how.summed or at[i] == there[i] for i in range(len(at))):
                mean = 1
                for axis, placement in enumerate(how.grad.places):
                    mean *= how.grad.mesh[axis] if placement == MEAN else 1
                total[cut(numbers, how.grad, there).flatten()] += term(how, whole, other).flatten() / mean
        mine = cut(numbers, how.case, at).flatten()
        made.view(-1)[mine] = total[mine]
    return made


def elsewhere_gradient(how, whole, rank, mesh):
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(
        term(how, whole, rank), mesh, how.grad.places, run_check=False, shape=whole.shape, stride=stride
    )


ABSENT_AT = {0: (), 1: (1,), 2: (0,), 3: ()}  # by step: who has no gradient


def elsewhere_start(how):
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(how.shape, generator=generator, dtype=torch.float64)
    steps = [torch.randn(how.shape, generator=generator, dtype=torch.float64) for _ in ABSENT_AT]
    if any(isinstance(placement, Partial) for placement in how.grad.places):
        steps[3].fill_(1e308 * 1.5)
        steps[3] *= 1.5  # each term is finite, and their sum is not
    return whole, steps


def elsewhere_run(rank, how):
    mesh = init_device_mesh("cpu", how.case.mesh, mesh_dim_names=tuple("abc"[: len(how.case.mesh)]))
    weight, steps = elsewhere_start(how)
    p, w = nn.Parameter(place(weight, mesh, how.case)), nn.Parameter(weight.clone())
    options = {"rule": how.rule, "lr": 0.1}
    optimizer, reference = RuleOptimizer([("w", p)], **options), RuleOptimizer([("w", w)], **options)
    for step, gradient in enumerate(steps):
        absent = ABSENT_AT[step]
        p.grad = None if rank in absent else elsewhere_gradient(how, gradient, rank, mesh)
        before = None if p.grad is None else p.grad.to_local().clone()
        w.grad = elsewhere_whole(how, gradient, absent)
        optimizer.step()
        reference.step()
        if before is not None:
            assert torch.equal(p.grad.to_local(), before), "the user's gradient stays as it is"
            assert p.grad.placements == how.grad.places
    assert optimizer.skipped_steps == reference.skipped_steps
    at = elsewhere_coordinates(how, rank)
    return (local(p) - cut(w.detach(), how.case, at)).abs().sum().item(), optimizer.skipped_steps


@pytest.mark.parametrize("name", ELSEWHERE)
def test_gradients_that_are_not_placed_as_their_parameters(name):
    """Four steps: all there, absent on rank 1, on rank 0, and a sum that is not finite of terms that are."""
    how = ELSEWHERE[name]
    for difference, skipped in simulate(how.case.world, elsewhere_run, how):
        assert difference < 1e-9
        assert skipped == (SUM in how.grad.places or MEAN in how.grad.places)


def elsewhere_clip(rank, how):
    """The norm for each pattern of absent gradients, and what is left of the gradient at the last."""
    mesh = init_device_mesh("cpu", how.case.mesh, mesh_dim_names=tuple("abc"[: len(how.case.mesh)]))
    weight, steps = elsewhere_start(how)
    p, plain = nn.Parameter(place(weight, mesh, how.case)), nn.Parameter(torch.zeros(2))
    norms = []
    for step, gradient in enumerate(steps):
        p.grad = None if rank in ABSENT_AT[step] else elsewhere_gradient(how, gradient, rank, mesh)
        plain.grad = torch.tensor([3.0, 4.0])
        norms.append(clip_grad_norm_([p, plain], 0.5))
    left = p.grad.to_local() - term(how, steps[-1], rank) * min(1.0, 0.5 / norms[-1].item())
    return torch.stack(norms), left.abs().max().item() if left.numel() and norms[-1].isfinite() else 0.0


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_norm_of_gradients_that_are_not_placed_as_their_parameters(name):
    how = ELSEWHERE[name]
    _, steps = elsewhere_start(how)
    wholes = [elsewhere_whole(how, gradient, ABSENT_AT[step]) for step, gradient in enumerate(steps)]
    want = torch.stack([(whole.square().sum() + 25).sqrt() for whole in wholes])
    for norms, off in simulate(how.case.world, elsewhere_clip, how):
        torch.testing.assert_close(norms, want)
        assert off < 1e-6


def moved_bytes(rank):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(place(torch.ones(8, 6), mesh, Case((2,), (R,), ())))
    optimizer = Dion([("w", p)])
    p.grad = DTensor.from_local(torch.eye(8, 6), mesh, [SUM], run_check=False)
    optimizer.step()
    plan = optimizer.plan()
    usual = step_cost(plan, optimizer.param_groups).wire + agreement_bytes(plan) + comparison_bytes(plan)
    return optimizer.bytes_sent - usual - agreement_bytes(plan)


def test_what_is_sent_to_place_a_gradient_is_counted():
    """The gradient once, three numbers to agree on how, and the agreement of a step once more."""
    assert simulate(2, moved_bytes) == [8 * 6 * 4 + 3 * 8] * 2


def other_ways(rank, kind):
    """A gradient that cannot be taken on rank 0; the parameter on rank 1 has a usual one, beside others."""
    mesh = init_device_mesh("cpu", (2,))
    lies = Case((2,), (R,), ())
    p, q = (nn.Parameter(place(torch.ones(4, 4), mesh, lies)) for _ in range(2))
    optimizer = Dion([("p", p), ("q", q)])
    p.grad, q.grad = (place(torch.eye(4), mesh, lies) for _ in range(2))
    if rank == 0:
        q.grad = DTensor.from_local(torch.eye(4), mesh, [Partial(kind)], run_check=False)
    norm = clip_grad_norm_([p, q], 1.0)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert torch.equal(local(p), torch.ones(4, 4))
    assert torch.equal(p.grad.to_local(), torch.eye(4))
    return norm.isnan().item(), str(caught.value)


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_gradients_placed_in_different_ways_on_different_ranks_are_refused_on_all(kind):
    (nan, first), (nan_too, second) = simulate(2, other_ways, kind)
    assert nan
    assert nan_too
    assert "'q'" in first
    assert "redistribute it to the parameter's placements" in first
    assert "another rank" in second
