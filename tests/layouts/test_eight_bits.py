"""State in 8 bits: the same bits on every layout, whatever it cuts; checkpoints that move; to numbers and back."""

from __future__ import annotations

import copy
import itertools
import tempfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from table import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    RULES,
    S0,
    Case,
    R,
    errors,
    local,
    many_ranks,
    one_process,
    place,
    state_cut,
    tensors,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from orthoshard import RuleOptimizer
from orthoshard.budget import step_cost
from orthoshard.linalg import eight_bits
from orthoshard.linalg.eight_bits import BLOCK, decode, encode_, largest_of_blocks, scales
from simulate import simulate

EIGHT = {"state_dtype": "int8"}
QUICK = ("ddp x2", "fsdp x3", "fsdp dim 1 x3", "fsdp 2 within row-wise tp 2", "replicas 2, fsdp 2, tp 2")
CASES = [
    pytest.param(case, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, case in LAYOUTS.items()
]
# Columns in three blocks, which two and three ranks cut in the middle; rows that fewer ranks have.
WIDE = (5, 2 * BLOCK + 7)


def test_reading_and_writing_back_changes_no_bit():
    x = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 3)[None, :, None]
    x[0, 0, :100] = 0.0
    x[1, 2] = 0.0
    for dtype in (torch.float32, torch.float64):
        q = torch.zeros(x.shape, dtype=torch.int8)
        scale = scales(largest_of_blocks(x.to(dtype), 5000, 0))
        encode_(q, x.to(dtype).clone(), scale, 0)
        once = decode(q, scale, 0, dtype)
        assert ((once - x).abs() <= 0.5001 * scale.to(dtype).repeat_interleave(BLOCK, -1)[..., :5000] * 1.004).all()
        again, q2 = scales(largest_of_blocks(once, 5000, 0)), torch.zeros_like(q)
        assert torch.equal(again, scale)
        encode_(q2, once, again, 0)
        assert torch.equal(q, q2)


def ranks(rank, case, options, shape, dtype):
    """What differs, to the bit, from one process."""
    whole = one_process({**options, "shard_state": "none"}, shape, 3, dtype)
    got = many_ranks(rank, case, options, shape, 3, dtype)
    coordinates = (torch.arange(case.world).view(case.mesh) == rank).nonzero()[0].tolist()
    for (_, state), (_, expected) in zip(got, whole, strict=True):
        for name in ("momentum", "momentum_scales"):
            if name in state:
                piece = state_cut(expected[name], name, case, coordinates, options, shape)
                assert torch.equal(state[name], piece), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["muon", "dion_tail 1/4"])
def test_the_same_bits_on_every_layout(rule, case):
    """Of float32 momentum: each entry is a sum of gradients, whatever is cut, and the maximum of a block a maximum."""
    options = {**RULES[rule], **EIGHT}
    one_process(options, WIDE, 3, torch.float32)
    simulate(case.world, ranks, case, options, WIDE, torch.float32)


def first_basis(rank, case, rule):
    """Q and its scales as they are drawn."""
    options = {**RULES[rule], **EIGHT}
    whole, numbers = (build(None, {**options, **more}) for more in ({}, {"state_dtype": None}))
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    p, optimizer, _ = build(case, options, mesh=mesh)
    for each in (optimizer, whole[1], numbers[1]):
        each.initialize_state()
    expected = whole[1].state[whole[0]]
    for name in ("Q", "Q_scales"):
        piece = state_cut(expected[name], name, case, mesh.get_coordinate(), options, WIDE)
        assert torch.equal(local(optimizer.state[p][name]), piece), name
    Q = numbers[1].state[numbers[0]]["Q"]
    assert (expected["Q"] * expected["Q_scales"].float() - Q).abs().max() <= Q.abs().max() / 200


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("rule", ["dion 1/2", "dion_tail 1/4"])
def test_the_first_basis_has_the_same_bits_on_every_layout(rule, name):
    simulate(LAYOUTS[name].world, first_basis, LAYOUTS[name], rule)


@pytest.mark.parametrize("case", CASES)
def test_error_feedback_takes_the_same_steps_on_every_layout(case):
    """What it takes out of the momentum is a product, which rounds otherwise where it is cut: in float64."""
    options = {**RULES["dion 1/2"], **EIGHT}
    one_process(options, (5, 40), 3, torch.float64)
    wrong = simulate(case.world, errors, case, options, (5, 40), 3, torch.float64)
    assert not any(wrong), wrong


@pytest.mark.parametrize("case", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS)
def test_experts(case):
    options = {**RULES["muon"], **EIGHT}
    one_process(options, (3, 6, 4), 3, torch.float32)
    simulate(case.world, ranks, case, options, (3, 6, 4), torch.float32)


def build(case, options, shape=WIDE, mesh=None, gradients=()):
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(shape, generator=generator) for _ in range(6)]
    placed = (lambda w: place(w, mesh, case)) if mesh else torch.clone
    p = nn.Parameter(placed(whole[0]))
    optimizer = RuleOptimizer([("w", p)], **options)

    def go(first, last):
        for G in whole[first:last]:
            p.grad = placed(G)
            optimizer.step()

    return p, optimizer, go


@pytest.mark.parametrize("to", ["row-wise tp x2", "left to right 2x2"])
def test_saved_by_rows_and_loaded_on_another_layout_it_goes_on_to_the_bit(to):
    options = {**RULES["muon"], **EIGHT}
    p, optimizer, go = build(None, options)
    go(1, 6)
    expected = {name: x.clone() for name, x in optimizer.state[p].items()}
    with tempfile.TemporaryDirectory() as folder:

        def save(rank):
            case = LAYOUTS["fsdp x2"]
            _, optimizer, go = build(case, options, mesh=init_device_mesh("cpu", case.mesh))
            go(1, 4)
            dcp.save({"state": optimizer.state_dict()["state"][0]}, checkpoint_id=folder)

        def load(rank):
            case = LAYOUTS[to]
            mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
            p, optimizer, go = build(case, options, mesh=mesh)
            optimizer.initialize_state()
            held = optimizer.state_dict()
            dcp.load({"state": held["state"][0]}, checkpoint_id=folder)
            optimizer.load_state_dict(held)
            go(4, 6)
            coordinates = mesh.get_coordinate()
            for name, whole in expected.items():
                piece = state_cut(whole, name, case, coordinates, options, WIDE)
                assert torch.equal(local(optimizer.state[p][name]), piece)

        simulate(2, save)
        simulate(LAYOUTS[to].world, load)


@pytest.mark.parametrize("case", [None, LAYOUTS["fsdp dim 1 x3"], LAYOUTS["hsdp 2x2"]], ids=["one", "columns", "hsdp"])
def test_a_checkpoint_goes_on_in_8_bits_and_in_numbers_again(case):
    def body(rank=0):
        mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("ab"[: len(case.mesh)])) if case else None
        p, optimizer, go = build(case, RULES["dion_tail 1/4"], mesh=mesh)
        go(1, 3)
        before = {name: local(x).clone() for name, x in optimizer.state[p].items()}
        optimizer.convert_state("int8")
        assert set(optimizer.state[p]) == {"momentum", "momentum_scales", "Q", "Q_scales"}
        assert isinstance(optimizer.state[p]["momentum_scales"], DTensor) == bool(case)
        saved = copy.deepcopy(optimizer.state_dict())
        _, other, more = build(case, {**RULES["dion_tail 1/4"], **EIGHT}, mesh=mesh)
        other.load_state_dict(saved)
        more(3, 5)
        optimizer.convert_state(None)
        assert set(optimizer.state[p]) == {"momentum", "Q"}
        for name, x in before.items():
            assert (local(optimizer.state[p][name]) - x).abs().max() <= x.abs().max() / 200
        optimizer.convert_state("int8")
        for name, x in saved["state"][0].items():
            assert torch.equal(local(optimizer.state[p][name]), local(x)), name

    simulate(case.world, lambda rank: body()) if case else body()


def test_other_bits_than_the_groups_are_refused_before_anything_changes():
    _, optimizer, go = build(None, RULES["muon"])
    go(1, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["state_dtype"] = "int8"
    _, eight, _ = build(None, {**RULES["muon"], **EIGHT})
    with pytest.raises(ValueError, match="momentum_scales"):
        eight.load_state_dict(saved)
    saved["state"][0]["momentum_scales"] = torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"in 8 bits.*convert_state"):
        eight.load_state_dict(saved)
    for there, here in itertools.permutations([None, "bfloat16", "int8"], 2):
        held = build(None, {**RULES["muon"], "state_dtype": there})[1].state_dict()
        _, other, _ = build(None, {**RULES["muon"], "state_dtype": here})
        with pytest.raises(ValueError, match=rf"with state_dtype={there!r}, load .*convert_state\({here!r}\)"):
            other.load_state_dict(held)
        held["param_groups"][0]["state_dtype"] = "zzz"
        with pytest.raises(ValueError, match="state_dtype='zzz' is unknown"):
            other.load_state_dict(held)
        assert other.param_groups[0]["state_dtype"] == here
    with pytest.raises(ValueError, match="rounded to 8 bits is not the momentum"):
        build(None, {**RULES["dion 1/2"], **EIGHT, "replica_sync": "factors"})
    with pytest.raises(ValueError, match="state_dtype='int4' is unknown"):
        eight.convert_state("int4")
    assert not eight.state


@pytest.mark.parametrize("view", ["conv", "transposed", "rows:3,2", "columns:4,4", "rows:2*(1,2)"])
@pytest.mark.parametrize("rule", ["muon", "dion", "dion_tail"])
def test_views(rule, view):
    shape = {"conv": (4, 3, 2), "rows:2*(1,2)": (6, 5), "columns:4,4": (6, 8)}.get(view, (5, 8))
    runs = []
    for state_dtype in (None, "int8"):
        p, optimizer, go = build(None, {"rule": rule, "state_dtype": state_dtype}, shape=shape)
        optimizer.param_groups[0]["view"] = view
        go(1, 6)
        runs.append(p.detach())
    start = build(None, {"rule": rule}, shape=shape)[0].detach()
    assert 0 < (runs[0] - runs[1]).norm() < 0.05 * (runs[0] - start).norm()


@pytest.mark.parametrize("rule", ["muon", "dion", "dion_tail"])
def test_the_state_takes_a_quarter_of_the_bytes(rule):
    costs = []
    for state_dtype in (None, "int8"):
        p = nn.Parameter(torch.empty(1024, 4096, device="meta"))
        optimizer = RuleOptimizer([("w", p)], rule=rule, state_dtype=state_dtype)
        costs.append(step_cost(optimizer.plan(), optimizer.param_groups).state)
    assert costs[1] / costs[0] == pytest.approx(0.25, rel=0.01)


def test_pieces_from_any_column_on_are_the_whole_matrixs(monkeypatch):
    monkeypatch.setattr(eight_bits, "BLOCK", 4)
    x = torch.randn(2, 3, 19, generator=torch.Generator().manual_seed(0))
    scale = scales(largest_of_blocks(x, 19, 0))
    q = torch.zeros(x.shape, dtype=torch.int8)
    encode_(q, x.clone(), scale, 0)
    for first, last in ((0, 3), (3, 10), (10, 19), (5, 5), (7, 8)):
        part = torch.zeros(2, 3, last - first, dtype=torch.int8)
        largest = largest_of_blocks(x[..., first:last], 19, first)
        assert (largest <= largest_of_blocks(x, 19, 0)).all()
        encode_(part, x[..., first:last].clone(), scale, first)
        assert torch.equal(part, q[..., first:last])
        assert torch.equal(
            decode(part, scale, first, torch.float32), decode(q, scale, 0, torch.float32)[..., first:last]
        )


def test_a_replica_of_its_own_state_and_of_rows():
    case = Case((2, 2), (R, S0), ((1, 0),))
    options = {**RULES["muon"], **EIGHT, "shard_state": "zero1"}
    one_process({**options, "shard_state": "none"}, WIDE, 3, torch.float32)
    simulate(4, errors, case, options, WIDE, 3, torch.float32)


def converted(rank):
    """Replicas that exchange factors keep momenta of their own gradients; in 8 bits they need the mean."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(tensors((64, 96), 1, torch.float32)[0][0])
    optimizer = RuleOptimizer(
        [("w", parameter)], rule="dion", rank_fraction=0.1, process_group=mesh.get_group(), replica_sync="auto"
    )
    for step in range(4):
        if step == 2:
            assert optimizer.plan().buckets[0].updates[0].replicas == "average"
            optimizer.convert_state("int8")
        generator = torch.Generator().manual_seed(10 * step + rank)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameter.detach().clone()


def test_momenta_of_replicas_are_averaged_before_they_are_converted():
    first, second = simulate(2, converted)
    assert torch.equal(first, second)


def test_groups_of_later_have_the_new_bits_and_so_has_frozen_state():
    first, second, third = (nn.Parameter(torch.randn(8, 12)) for _ in range(3))
    optimizer = RuleOptimizer([first, second], rule="dion")
    for parameter in (first, second):
        parameter.grad = torch.randn(8, 12)
    optimizer.step()
    second.requires_grad_(False)
    optimizer.convert_state("int8")
    assert not second.requires_grad
    assert all(optimizer.state[p]["momentum"].dtype == torch.int8 for p in (first, second))
    second.requires_grad_(True)
    optimizer.add_param_group({"params": [third]})
    assert [group["state_dtype"] for group in optimizer.param_groups] == ["int8", "int8"]
    third.grad = torch.randn(8, 12)
    optimizer.step()
