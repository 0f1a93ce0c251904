"""Layout independence: every rule, on every layout, equals its one-process run.

On simulated ranks, in float64, and in float32 at one shape (the others are slow tests); bytes sent and state held are
what `cost` says, to the byte.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from table import (
    EXPERT_LAYOUTS,
    EXPERT_SHAPES,
    LAYOUTS,
    RULES,
    SHAPES,
    TOLERANCE,
    Case,
    R,
    cut,
    errors,
    in_turn,
    local,
    one_process,
    pairwise,
    place,
    tensors,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from orthoshard import RuleOptimizer, plan
from orthoshard.engine.comm import Comm
from orthoshard.layout import mesh_axes
from simulate import simulate

# Three matrices: a batch that no mesh of the table divides, so that owners get different numbers of them.
COUNT = 3


def check(case, options, shape, dtype):
    one_process({**options, "shard_state": "none"}, shape, COUNT, dtype)  # once, and not by every rank at once
    wrong = simulate(case.world, errors, case, options, shape, COUNT, dtype)
    assert not any(wrong), "\n".join([f"{options}, {shape}", *(line for lines in wrong for line in lines)])


@pytest.mark.parametrize(("options", "case", "shape"), pairwise(RULES, LAYOUTS, SHAPES))
def test_matrices(options, case, shape):
    check(case, options, shape, torch.float64)


EVERY = [(case, SHAPES) for case in LAYOUTS.values()] + [(case, EXPERT_SHAPES) for case in EXPERT_LAYOUTS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("case", "shapes"), EVERY, ids=[*LAYOUTS, *(f"{name}, experts" for name in EXPERT_LAYOUTS)])
def test_every_rule_and_shape(case, shapes, dtype):
    """In float32 the reductions of many ranks differ in rounding alone."""
    for options, shape in itertools.product(RULES.values(), shapes.values()):
        check(case, options, shape, dtype)


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
def test_bfloat16_state_where_a_rank_has_no_column(rule, monkeypatch):
    """State rounds otherwise where sums do; over five random gradients the one column of Q then turns by up to 4e-2."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.1)
    check(Case((4,), (Shard(1),), ((0, 1),)), {"rule": rule, "state_dtype": "bfloat16"}, (10, 3), torch.float32)


@pytest.mark.parametrize(("options", "case", "shape"), pairwise(RULES, EXPERT_LAYOUTS, EXPERT_SHAPES))
def test_experts(options, case, shape):
    check(case, options, shape, torch.float64)


REPLICATED = {name: case for name, case in LAYOUTS.items() if R in case.places or not case.places}


@pytest.mark.parametrize("case", REPLICATED.values(), ids=REPLICATED)
@pytest.mark.parametrize("rule", ["dion 1/2", "dion_tail 1/4", "muon"])
def test_work_repeated_at_replicas(rule, case):
    check(case, {**RULES[rule], "replica_compute": "repeat"}, SHAPES["prime"], torch.float64)


@pytest.mark.parametrize(("options", "case"), in_turn(RULES, LAYOUTS, 3))
def test_one_shape_in_float32(options, case):
    check(case, options, SHAPES["prime"], torch.float32)


@pytest.mark.parametrize("state", ["none", "zero1"])
@pytest.mark.parametrize("name", ["ddp x2", "hsdp 2x2", "fsdp 2, row-wise tp 2"])
def test_state_in_host_memory(name, state):
    for rule in ("dion 1/2", "muon"):
        options = {**RULES[rule], "state_offload": True, "shard_state": state}
        check(LAYOUTS[name], options, SHAPES["prime"], torch.float64)


def many_shapes(options, shapes, case=None):
    """Buckets of several shapes and sizes in one optimizer, for owners and replicas that get different shares. What
    each rank has at the end; on one process, where there is no ``case``, which all must equal."""
    mesh = case and init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    placed = (lambda w: place(w, mesh, case)) if case else torch.clone
    whole = [w for i, shape in enumerate(shapes) for w in tensors(shape, 1 + i % 2, torch.float64, seed=i)[0]]
    parameters = [torch.nn.Parameter(placed(w)) for w in whole]
    group = mesh.get_group() if case and not case.places else None
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    optimizer = RuleOptimizer(named, process_group=group, replica_compute="split", **options)
    for step in range(2):
        for i, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = placed(torch.randn(whole[i].shape, generator=generator, dtype=torch.float64))
        optimizer.step()
    return [local(p) for p in parameters], mesh and mesh.get_coordinate()


def check_together(case, options, shapes):
    wholes, _ = many_shapes(options, shapes)
    for rank, (pieces, at) in enumerate(simulate(case.world, lambda _: many_shapes(options, shapes, case))):
        for i, (piece, p) in enumerate(zip(pieces, wholes, strict=True)):
            assert torch.allclose(piece, cut(p, case, at), rtol=0, atol=1e-9), f"rank {rank}, w{i}"


TWO = {rule: RULES[rule] for rule in ("dion 1/2", "muon")}


@pytest.mark.parametrize(("options", "case"), in_turn(TWO, LAYOUTS, 2))
def test_many_buckets_in_flight(options, case):
    check_together(case, options, [*SHAPES.values(), (9, 9)])


@pytest.mark.parametrize(("options", "case"), in_turn(TWO, EXPERT_LAYOUTS, 2))
def test_many_expert_buckets_in_flight(options, case):
    check_together(case, options, [(1, 4, 4), (5, 4, 6), (2, 3, 3), (3, 7, 2), (1, 2, 9)])


def test_the_simulation_fails_where_ranks_ask_different_things():
    def different(rank):
        (axis,) = mesh_axes("w", init_device_mesh("cpu", (2,)))
        Comm().all_reduce(torch.zeros(1 + rank), axis).wait()

    with pytest.raises(AssertionError):
        simulate(2, different)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("rule", ["dion 1/2", "muon"])
def test_experts_and_matrices_under_one_fully_shard(rule, world):
    """Stacks cut by experts, of which there may be fewer than ranks, beside matrices cut by rows."""
    mixed = [(3, 4, 4), (8, 6), (1, 3, 3), (5, 9), (2, 3, 3), (8, 6)]
    check_together(Case((world,), (Shard(0),), ((0, 0),)), RULES[rule], mixed)


def test_ranks_with_other_meshes_or_other_groups_are_told_before_the_first_update():
    def grouping(rank):
        mesh = init_device_mesh("cpu", (2,))
        named = [(f"w{i}", torch.nn.Parameter(place(torch.ones(4, 4), mesh, LAYOUTS["fsdp x2"]))) for i in range(3)]
        apart = [{"params": [pair]} for pair in named]
        optimizer = RuleOptimizer([{"params": named}] if rank else apart)
        with pytest.raises(RuntimeError, match="differ from parameter"):
            optimizer.step()

    def asking(rank):
        whole = init_device_mesh("cpu", (4,))
        halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))["y"]
        named = [("w", torch.nn.Parameter(place(torch.ones(8, 4), whole, LAYOUTS["fsdp x4"])))]
        if rank < 2:
            named.append(("v", torch.nn.Parameter(place(torch.ones(4, 4), halves, LAYOUTS["fsdp x2"]))))
        with pytest.raises(RuntimeError, match="differ from parameter 'w'"):
            RuleOptimizer(named).step()

    simulate(2, grouping)
    simulate(4, asking)


def test_state_dict_and_loading_are_each_ranks_own_business():
    """One rank alone may save, and one rank alone may load: they meet again in the next step."""

    def saving(rank):
        mesh = init_device_mesh("cpu", (2,))
        p = torch.nn.Parameter(torch.ones(6, 4))
        optimizer = RuleOptimizer([("w", p)], process_group=mesh.get_group())
        if rank == 0:
            optimizer.initialize_state()
            optimizer.state_dict()
        for turn in range(3):
            p.grad = torch.eye(6, 4)
            optimizer.step()
            if rank == turn % 2:
                optimizer.load_state_dict(optimizer.state_dict())
        return p.detach()

    first, second = simulate(2, saving)
    assert torch.equal(first, second)


def test_state_placed_otherwise_is_refused_and_whole_state_is_cut():
    def loading(rank):
        mesh = init_device_mesh("cpu", (2,))
        case, other = LAYOUTS["fsdp x2"], Case((2,), (Shard(1),), ((0, 1),))
        p = torch.nn.Parameter(place(torch.ones(4, 4), mesh, case))
        optimizer = RuleOptimizer([("w", p)])
        optimizer.initialize_state()
        saved = optimizer.state_dict()
        momentum = torch.arange(16.0).view(4, 4)
        saved["state"][0]["momentum"] = place(momentum, mesh, other)
        with pytest.raises(ValueError, match="is placed as"):
            optimizer.load_state_dict(saved)
        saved["state"][0]["momentum"] = momentum
        optimizer.load_state_dict(saved)
        p.grad = place(torch.zeros(4, 4), mesh, case)
        optimizer.initialize_state()
        assert torch.equal(local(optimizer.state[p]["momentum"]), momentum[2 * rank : 2 * rank + 2])

    simulate(2, loading)


def test_gradients_of_odd_strides_are_averaged_over_replicas_as_matrices():
    def absent_somewhere(rank):
        mesh = init_device_mesh("cpu", (2,))
        p = torch.nn.Parameter(torch.zeros(3, 2))
        optimizer = RuleOptimizer([("w", p)], rule="lion", process_group=mesh.get_group(), lr=1.0)
        g = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
        p.grad = g.mT.contiguous().mT if rank == 0 else None
        optimizer.step()
        assert torch.equal(p, -g)

    simulate(2, absent_somewhere)


@pytest.mark.parametrize(("options", "case"), in_turn(TWO, EXPERT_LAYOUTS, 2))
def test_slices_of_experts_on_every_layout(options, case, monkeypatch):
    monkeypatch.setattr(plan, "BUCKET_BYTES", 200)
    check(case, options, EXPERT_SHAPES["experts"], torch.float64)
