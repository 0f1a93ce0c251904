"""Replicas with gradients of their own: the same weights as with averaged gradients, from thin factors alone."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from first_step import comparison_bytes, own_gradients_bytes
from table import in_turn, local, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from orthoshard import RuleOptimizer, clip_grad_norm_
from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.engine import replicas
from orthoshard.lab.plan.count import counted
from simulate import simulate

STEPS = 4
# name: mesh, dimensions cut by the axes after the first, which is that of the replicas
MESHES = {
    "ddp x2": ((2,), ()),
    "ddp x4": ((4,), ()),
    "hsdp 2x2": ((2, 2), (0,)),
    "replicas 2, fsdp 2, tp 2": ((2, 2, 2), (0, 1)),
    "replicas 2, columns 3": ((2, 3), (1,)),
}
SHAPES = [(16, 12), (12, 16), (8, 8), (9, 5)]


def whole_gradients(replica, step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 * step + replica)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def place(whole, mesh, dims):
    """Cut by the axes after the first; the optimizer alone knows that the first replicates."""
    if not dims:
        return whole.clone()
    inner = mesh[mesh.mesh_dim_names[1:]]
    piece = whole
    for axis, dim in enumerate(dims):
        chunks = piece.chunk(inner.size(axis), dim)
        at = inner.get_coordinate()[axis]
        piece = chunks[at] if at < len(chunks) else piece.narrow(dim, 0, 0)
    stride = torch.empty(whole.shape, device="meta").stride()
    places = [Shard(dim) for dim in dims]
    return DTensor.from_local(
        piece.clone(memory_format=torch.contiguous_format),
        inner,
        places,
        run_check=False,
        shape=whole.shape,
        stride=stride,
    )


def start(weights, **options):
    parameters = [nn.Parameter(weight) for weight in weights]
    named = [(f"w{i}", p) for i, p in enumerate(parameters[:-1])]
    groups = [{"params": named, **options}, {"params": [("bias", parameters[-1])], "rule": "adamw"}]
    return parameters, groups


def first_weights():
    weights = [w for i, shape in enumerate(SHAPES) for w in tensors(shape, 1, torch.float64, seed=i)[0]]
    return [*weights, torch.zeros(5, dtype=torch.float64)]


def gradients(replica, step):
    bias = torch.randn(5, generator=torch.Generator().manual_seed(50 * step + replica), dtype=torch.float64)
    return [*whole_gradients(replica, step), bias]


def reference(replicas, absent=frozenset(), **options):
    """One process, the mean gradient."""
    return _reference(replicas, absent, tuple(options.items()))


@cache  # every rank asks
def _reference(replicas, absent, options):
    parameters, groups = start(first_weights(), **dict(options))
    optimizer = RuleOptimizer(groups)
    for step in range(STEPS):
        drawn = [gradients(replica, step) for replica in range(replicas)]
        for i, parameter in enumerate(parameters):
            here = [drawn[r][i] * ((r, i) not in absent) for r in range(replicas)]
            parameter.grad = torch.stack(here).mean(0)
        optimizer.step()
    return [p.detach() for p in parameters], [dict(optimizer.state[p]) for p in parameters]


def many(rank, shape, dims, sync, absent, options):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "b", "c")[: len(shape)])
    replica = mesh.get_coordinate()[0]
    inner = mesh.get_coordinate()[1:]
    expected, state = reference(shape[0], absent, **options)
    placed = [place(w, mesh, dims if w.ndim == 2 else ()) for w in first_weights()]
    parameters, groups = start(placed, **options)
    group = mesh["replicas"] if len(shape) > 1 else mesh.get_group()
    optimizer = RuleOptimizer(groups, process_group=group, replica_sync=sync, drift_check=3)
    optimizer.initialize_state()
    for step in range(STEPS):
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients(replica, step), strict=True)):
            parameter.grad = (
                None if (replica, i) in absent else place(gradient, mesh, dims if gradient.ndim == 2 else ())
            )
        kept = [None if p.grad is None else local(p.grad).clone() for p in parameters]
        before, calls = optimizer.bytes_sent, optimizer._comm.calls
        optimizer.step()
        if step == 1 and not absent:
            plan = optimizer.plan()
            planned = counted(plan, optimizer.param_groups, 1).messages
            assert len(planned) == optimizer._comm.calls - calls
            assert optimizer.bytes_sent - before == step_cost(plan, optimizer.param_groups).wire + agreement_bytes(plan)
        assert all(k is None or torch.equal(k, local(p.grad)) for k, p in zip(kept, parameters, strict=True))
    for i, (parameter, whole) in enumerate(zip(parameters, expected, strict=True)):
        want = cut_inner(whole, shape, dims, inner)
        assert torch.allclose(local(parameter), want, rtol=0, atol=1e-9 * whole.norm()), f"rank {rank}, w{i}"
    live = deepcopy(optimizer.state[parameters[0]]["momentum"])
    saved = optimizer.state_dict()["state"]
    assert torch.equal(local(live), local(optimizer.state[parameters[0]]["momentum"])), "the live state is untouched"
    for i in range(len(SHAPES)):
        mean = local(saved[i]["momentum"])
        assert torch.allclose(mean, cut_inner(state[i]["momentum"], shape, dims, inner), rtol=0, atol=1e-9)


def check(shape, dims, sync, options, absent=frozenset()):
    reference(shape[0], absent, **options)  # once, and not by every rank at once
    simulate(int(torch.tensor(shape).prod()), many, shape, dims, sync, absent, options)


def cut_inner(whole, shape, dims, at):
    if whole.ndim < 2:
        return whole
    for size, dim, coordinate in zip(shape[1:], dims, at, strict=False):
        chunks = whole.chunk(size, dim)
        whole = chunks[coordinate] if coordinate < len(chunks) else whole.narrow(dim, 0, 0)
    return whole


# What "gradients" sends does not depend on the rank; "auto" is either, by the rank.
SYNCS = [("gradients", 0.5), ("factors", 0.125), ("factors", 0.5), ("factors", 1.0), ("auto", 0.125), ("auto", 1.0)]


@pytest.mark.parametrize(("sync", "mesh"), in_turn({f"{sync} {rank}": (sync, rank) for sync, rank in SYNCS}, MESHES, 2))
def test_the_trajectory_is_that_of_the_mean_gradient(sync, mesh):
    check(*mesh, sync[0], {"rule": "dion", "rank_fraction": sync[1]})


@pytest.mark.parametrize(("rule", "mesh"), in_turn({"muon": "muon", "dion_tail": "dion_tail"}, MESHES, 2))
def test_other_rules_average_gradients(rule, mesh):
    check(*mesh, "auto", {"rule": rule})


def test_gradients_in_several_pieces(monkeypatch):
    """Pieces smaller than one of these matrices: each is a collective of its own, and planned as one."""
    monkeypatch.setattr(replicas, "PIECE_BYTES", 500)
    check((2, 2), (0,), "gradients", {"rule": "muon"})


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_either_side(side):
    check((2, 2), (0,), "factors", {"rule": "dion", "rank_fraction": 0.5, "q_side": side})


def test_a_gradient_missing_on_some_replicas_counts_as_zero_there():
    absent = frozenset({(0, 1), (1, 2), (0, 4)})
    for shape, dims in (MESHES["ddp x2"], MESHES["hsdp 2x2"]):
        check(shape, dims, "factors", {"rule": "dion", "rank_fraction": 0.5}, absent)


def first_step(rank, shape, dims, draw):
    """What a first step sends and raises, with gradients ``draw(replica, i)``."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "b", "c")[: len(shape)])
    replica = mesh.get_coordinate()[0]
    parameters, groups = start([place(w, mesh, dims if w.ndim == 2 else ()) for w in first_weights()])
    group = mesh["replicas"] if len(shape) > 1 else mesh.get_group()
    optimizer = RuleOptimizer(groups, process_group=group, replica_sync="factors")
    before = [local(p).clone() for p in parameters]
    for i, parameter in enumerate(parameters):
        gradient = draw(replica, i)
        parameter.grad = place(gradient, mesh, dims if gradient.ndim == 2 else ())
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(b, local(p)) for b, p in zip(before, parameters, strict=True))
        return str(error)
    plan = optimizer.plan()
    predicted = step_cost(plan, optimizer.param_groups).wire + agreement_bytes(plan) + comparison_bytes(plan)
    if not optimizer.skipped_steps:
        assert optimizer.bytes_sent == predicted + own_gradients_bytes(plan)
    momenta = [local(state["momentum"]) for state in optimizer.state.values() if "momentum" in state]
    return optimizer.skipped_steps, bool(any(momentum.any() for momentum in momenta))


def same_everywhere(replica, i):
    return gradients(0, 0)[i]


def own(replica, i):
    return gradients(replica, 0)[i]


def own_with_nan(replica, i):
    return own(replica, i) * (torch.nan if (replica, i) == (1, 2) else 1)


@pytest.mark.parametrize(("shape", "dims"), MESHES.values(), ids=MESHES)
def test_gradients_that_are_averaged_already_are_refused_on_every_rank(shape, dims):
    world = int(torch.tensor(shape).prod())
    for answer in simulate(world, first_step, shape, dims, same_everywhere):
        assert "averaged already" in answer
        assert "local_gradients" in answer
    assert simulate(world, first_step, shape, dims, own) == [(0, True)] * world


def test_a_gradient_that_is_not_finite_on_one_replica_skips_the_step_on_all():
    assert simulate(4, first_step, (2, 2), (0,), own_with_nan) == [(1, False)] * 4


def drift(rank):
    mesh = init_device_mesh("cpu", (2,))
    parameters, groups = start(first_weights())
    optimizer = RuleOptimizer(groups, process_group=mesh.get_group(), drift_check=2)
    for step in range(4):
        for parameter, gradient in zip(parameters, gradients(0, step), strict=True):
            parameter.grad = gradient
        if step == 2 and rank == 1:
            parameters[2].data[0, 0] = torch.nextafter(parameters[2].data[0, 0], torch.tensor(torch.inf).double())
        try:
            optimizer.step()
        except RuntimeError as error:
            return step, str(error)
    return None


def test_drift_of_one_bit_is_found_and_named():
    for step, sentence in simulate(2, drift):
        assert step == 3
        assert "'w2' is no longer the same" in sentence


def clipped(rank, shape, dims):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "b", "c")[: len(shape)])
    replica = mesh.get_coordinate()[0]
    parameters, _ = start([place(w, mesh, dims if w.ndim == 2 else ()) for w in first_weights()])
    mine = gradients(replica, 0)
    for parameter, gradient in zip(parameters, mine, strict=True):
        parameter.grad = place(gradient, mesh, dims if gradient.ndim == 2 else ())
    group = mesh["replicas"] if len(shape) > 1 else mesh.get_group()
    norm = clip_grad_norm_(parameters, 0.5, group)
    norms = [torch.cat([g.flatten() for g in gradients(r, 0)]).norm() for r in range(shape[0])]
    bound = torch.stack(norms).mean()
    assert abs(norm - bound) < 1e-5 * bound
    want = cut_inner(mine[0] * 0.5 / bound, shape, dims, mesh.get_coordinate()[1:])
    assert torch.allclose(local(parameters[0].grad), want, rtol=1e-5)
    means = [torch.stack([gradients(r, 0)[i] for r in range(shape[0])]).mean(0) for i in range(len(mine))]
    assert torch.cat([g.flatten() for g in means]).norm() <= bound


@pytest.mark.parametrize(("shape", "dims"), MESHES.values(), ids=MESHES)
def test_clipping_bounds_the_norm_of_the_mean_gradient(shape, dims):
    simulate(int(torch.tensor(shape).prod()), clipped, shape, dims)


GPT2_SMALL = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]


def bytes_of(rank, sync):
    mesh = init_device_mesh("cpu", (4,))
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in GPT2_SMALL for _ in range(4)]
    optimizer = RuleOptimizer(
        parameters, rank_fraction=1 / 16, process_group=mesh.get_group(), replica_sync=sync, replica_compute="repeat"
    )
    return float(step_cost(optimizer.plan(), optimizer.param_groups).wire)


def test_factors_are_a_sixth_of_the_gradients_at_most():
    """gpt2-small at rank 1/16, 4 replicas; a ring's all-reduce of all gradients, written down."""
    every = 2 * 3 / 4 * 4 * 4 * sum(m * n for m, n in GPT2_SMALL)
    assert simulate(4, bytes_of, "gradients") == [pytest.approx(every, rel=1e-3)] * 4
    assert max(simulate(4, bytes_of, "factors")) < every / 6
    assert simulate(4, bytes_of, "auto") == simulate(4, bytes_of, "factors")


def refused(rank, options):
    mesh = init_device_mesh("cpu", (2,))
    parameters, _ = start(first_weights())
    group = mesh.get_group() if "process_group" in options else None
    with pytest.raises(ValueError, match=options["match"]):
        RuleOptimizer(parameters[:2], process_group=group, replica_sync=options["sync"], rule=options.get("rule"))


@pytest.mark.parametrize(
    "options",
    [
        {"sync": "factors", "rule": "muon", "process_group": True, "match": "every entry of the averaged"},
        {"sync": "factors", "rule": "dion_tail", "process_group": True, "match": "every entry of the averaged"},
        {"sync": "factors", "match": "say which ranks"},
        {"sync": "factor", "process_group": True, "match": "replica_sync='factor' is unknown"},
    ],
    ids=lambda o: o["match"],
)
def test_what_cannot_be_is_refused(options):
    simulate(2, refused, options)


WAYS = {
    "none": {},
    "gradients": {"replica_sync": "gradients"},
    "factors": {"replica_sync": "factors"},
    "zero1": {"replica_sync": "gradients", "shard_state": "zero1"},
}


def resumed(rank, there, here):
    group, weights, saved = init_device_mesh("cpu", (2,)).get_group(), first_weights(), None
    for way, steps in ((there, range(3)), (here, range(3, STEPS))):
        parameters, groups = start(weights, rank_fraction=0.5)
        optimizer = RuleOptimizer(groups, process_group=group, **WAYS[way])
        if saved:
            optimizer.load_state_dict(saved)
        for step in steps:
            drawn = [gradients(replica, step) for replica in range(2)]
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.stack([each[i] for each in drawn]).mean(0) if way == "none" else drawn[rank][i]
            optimizer.step()
        weights, saved = [p.detach().clone() for p in parameters], optimizer.state_dict()
    for i, (weight, expected) in enumerate(zip(weights, reference(2, rank_fraction=0.5)[0], strict=True)):
        assert torch.allclose(weight, expected, rtol=0, atol=1e-9 * expected.norm()), f"rank {rank}, w{i}"


@pytest.mark.parametrize("here", WAYS)
@pytest.mark.parametrize("there", WAYS)
def test_what_one_way_has_saved_goes_on_in_another(there, here):
    reference(2, rank_fraction=0.5)
    simulate(2, resumed, there, here)


def narrow(rank, shape, dims):
    """Weights after five steps with factors in bfloat16 and in float32, and whether bytes are as predicted."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "b", "c")[: len(shape)])
    replica, results = mesh.get_coordinate()[0], []
    group = mesh["replicas"] if len(shape) > 1 else mesh.get_group()
    for wire in (None, "bfloat16"):
        placed = [place(w.float(), mesh, dims if w.ndim == 2 else ()) for w in first_weights()]
        parameters, groups = start(placed, rank_fraction=0.5)
        optimizer = RuleOptimizer(groups, process_group=group, replica_sync="factors", reduce_dtype=wire)
        for step in range(5):
            for parameter, gradient in zip(parameters, gradients(replica, step), strict=True):
                parameter.grad = place(gradient.float(), mesh, dims if gradient.ndim == 2 else ())
            before = optimizer.bytes_sent
            optimizer.step()
        plan = optimizer.plan()
        sent = step_cost(plan, optimizer.param_groups).wire
        assert optimizer.bytes_sent - before == sent + agreement_bytes(plan)
        first = [local(place(w.float(), mesh, dims if w.ndim == 2 else ())) for w in first_weights()]
        moved = torch.cat([(local(p) - w).flatten() for p, w in zip(parameters, first, strict=True)][:-1])
        results.append((moved, float(sent)))
    (exact, whole), (rounded, half) = results
    assert half < (0.9 if dims else 0.6) * whole, "what travels within a replica does so in float32"
    return (rounded - exact).norm() / exact.norm(), rounded


@pytest.mark.parametrize(("shape", "dims"), list(MESHES.values())[:4], ids=list(MESHES)[:4])
def test_factors_in_bfloat16(shape, dims):
    results = simulate(int(torch.tensor(shape).prod()), narrow, shape, dims)
    for error, _ in results:
        assert 0 < error < 0.03
    inner = int(torch.tensor(shape[1:]).prod())
    for rank, (_, moved) in enumerate(results):  # replicas stay equal to the bit
        assert torch.equal(moved, results[rank % inner][1])


def frozen_and_saved(rank):
    """What is saved of a matrix, while it trains and while it is frozen, and the momentum that this replica has."""
    p = nn.Parameter(torch.ones(64, 48))
    group = init_device_mesh("cpu", (2,))
    optimizer = RuleOptimizer([("w", p)], rank_fraction=0.1, replica_sync="factors", process_group=group)
    p.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(rank))
    optimizer.step()
    saved = []
    for on in (True, False):
        p.requires_grad_(on)
        saved.append(optimizer.state_dict()["state"][0]["momentum"].clone())
    return saved, optimizer.state[p]["momentum"].clone()


def test_the_mean_of_momenta_is_saved_of_a_frozen_matrix_too():
    ((mean, frozen), first), (_, second) = simulate(2, frozen_and_saved)
    assert not torch.equal(first, second)
    assert torch.equal(frozen, mean)
    assert torch.allclose(mean, (first + second) / 2)
