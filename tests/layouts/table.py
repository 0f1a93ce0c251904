"""The table that every rule and every layout must pass: rules x layouts x shapes, against the one-process run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from first_step import comparison_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from orthoshard import RuleOptimizer
from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.cost import all_reduce_bytes
from orthoshard.rules import RULES as KNOWN

STEPS = 2  # the first from no state, the second from what it has left


@dataclass(frozen=True)
class Case:
    """One way to cut.

    mesh   its shape
    places placements, one an axis
    order  (axis, dim) in the order of cutting, written down by hand: an oracle for what the library reads
    """

    mesh: tuple[int, ...]
    places: tuple
    order: tuple[tuple[int, int], ...]

    @property
    def world(self) -> int:
        return int(torch.tensor(self.mesh).prod())


R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)

LAYOUTS = {
    "ddp x2": Case((2,), (), ()),
    "ddp x3": Case((3,), (), ()),
    "replicated x2": Case((2,), (R,), ()),
    "fsdp x2": Case((2,), (S0,), ((0, 0),)),
    "fsdp x3": Case((3,), (S0,), ((0, 0),)),
    "fsdp x4": Case((4,), (S0,), ((0, 0),)),
    "fsdp x8": Case((8,), (S0,), ((0, 0),)),
    "fsdp dim 1 x3": Case((3,), (S1,), ((0, 1),)),
    "hsdp 2x2": Case((2, 2), (R, S0), ((1, 0),)),
    "hsdp 3x2": Case((3, 2), (R, S0), ((1, 0),)),
    "row-wise tp x2": Case((2,), (S1,), ((0, 1),)),
    "fsdp 2, row-wise tp 2": Case((2, 2), (S0, S1), ((0, 0), (1, 1))),
    "fsdp 3 dim 1, column-wise tp 2": Case((3, 2), (S1, S0), ((0, 1), (1, 0))),
    "fsdp 2 within column-wise tp 2": Case((2, 2), (_StridedShard(0, split_factor=2), S0), ((1, 0), (0, 0))),
    "fsdp 2 within row-wise tp 2": Case((2, 2), (_StridedShard(1, split_factor=2), S1), ((1, 1), (0, 1))),
    "left to right 2x2": Case((2, 2), (S0, S0), ((0, 0), (1, 0))),
    "replicas 2, fsdp 2, tp 2": Case((2, 2, 2), (R, S0, S1), ((1, 0), (2, 1))),
    "replicas 2, fsdp 2 within tp 2": Case((2, 2, 2), (R, _StridedShard(0, split_factor=2), S0), ((2, 0), (1, 0))),
}

EXPERT_LAYOUTS = {
    "experts x2": Case((2,), (S0,), ((0, 0),)),
    "experts x4": Case((4,), (S0,), ((0, 0),)),
    "expert rows x3": Case((3,), (S1,), ((0, 1),)),
    "expert columns x2": Case((2,), (S2,), ((0, 2),)),
    "experts 2, rows 2": Case((2, 2), (S0, S1), ((0, 0), (1, 1))),
    "experts 2 within experts 2": Case((2, 2), (_StridedShard(0, split_factor=2), S0), ((1, 0), (0, 0))),
    "replicas 2, experts 2": Case((2, 2), (R, S0), ((1, 0),)),
    "ddp x2": Case((2,), (), ()),
}

SHAPES = {
    "square": (8, 8),
    "tall": (24, 5),
    "wide": (5, 24),
    "prime": (13, 7),
    "tiny": (1, 3),
    "fewer rows than shards": (3, 10),
}
EXPERT_SHAPES = {"experts": (3, 6, 4), "wide experts": (5, 3, 8)}

RULES = {
    "dion 1/8": {"rule": "dion", "rank_fraction": 0.125},
    "dion 1/2": {"rule": "dion", "rank_fraction": 0.5},
    "dion full": {"rule": "dion", "rank_fraction": 1.0},
    "dion columns": {"rule": "dion", "rank_fraction": 0.5, "q_side": "columns"},
    "dion_tail 1/4": {"rule": "dion_tail", "rank_fraction": 0.25},
    "muon": {"rule": "muon"},
    "dion3 1/4": {"rule": "dion3"},
    "row_norm": {"rule": "row_norm"},
    "nora": {"rule": "row_norm", "tangent": True},
}
# nanochat's stack, and each stage alone.
NANOCHAT = {"equilibrate": "rows", "row_moment": 0.95, "frobenius": True, "decay": "cautious"}
STAGES = {
    "heavy ball": {"nesterov": False, "error_feedback": False},
    "Nesterov": {"nesterov": True, "error_feedback": False},
    "equilibrate rows": {"equilibrate": "rows"},
    "equilibrate columns": {"equilibrate": "columns"},
    "equilibrate both": {"equilibrate": "both"},
    "row moment": {"row_moment": 0.95},
    "frobenius": {"frobenius": True},
    "cautious": {"decay": "cautious", "weight_decay": 0.1},
    "hyperball": {"decay": "hyperball"},
    "update floor": {"update_floor": 0.35},
    "nanochat": {**NANOCHAT, "nesterov": True, "error_feedback": False},
}

# Relative error of weights and state over all steps. float32 orthonormalization amplifies rounding by the condition
# of its input, and cut sums round otherwise than whole ones.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def pairwise(*tables, of=1):
    """Rows of three tables (name -> value) such that every pair of any two has one: each pair of the first two with
    ``of`` of the third, in turn. Slow tests have the product."""
    first, second, third = tables
    every = len(third) // of
    return [
        pytest.param(first[a], second[b], third[c], id=f"{a}-{b}-{c}")
        for (i, a), (j, b), (k, c) in itertools.product(*map(enumerate, tables))
        if (i + j - k) % every == 0
    ]


def in_turn(first, second, of):
    """The rows of the product of two tables, one in ``of`` such that each entry has its turns; the others are slow."""
    return [
        pytest.param(first[a], second[b], id=f"{a}-{b}", marks=[pytest.mark.slow] * ((i + j) % of > 0))
        for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
    ]


def tensors(shape, count, dtype, seed=0, steps=STEPS):
    """`count` weights, and their gradients for each step."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]

    return draw(), [draw() for _ in range(steps)]


def cut(whole, case: Case, coordinates):
    """This rank's piece, by torch.chunk in the order of cutting."""
    for axis, dim in case.order:
        chunks = whole.chunk(case.mesh[axis], dim)
        empty = whole.narrow(dim, 0, 0)
        whole = chunks[coordinates[axis]] if coordinates[axis] < len(chunks) else empty
    return whole.clone(memory_format=torch.contiguous_format)


def one_process(options, shape, count, dtype):
    """Weights and state of the run that all others must equal."""
    return _one_process(tuple(options.items()), shape, count, dtype)


@cache  # every rank and every layout asks
def _one_process(options, shape, count, dtype):
    weights, steps = tensors(shape, count, dtype)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = RuleOptimizer([(f"w{i}", p) for i, p in enumerate(parameters)], **dict(options))
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [(p.detach(), dict(optimizer.state[p])) for p in parameters]


def place(whole, mesh, case: Case):
    if not case.places:
        return whole.clone()
    local = cut(whole, case, mesh.get_coordinate())
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, case.places, run_check=False, shape=whole.shape, stride=stride)


def many_ranks(rank, case: Case, options, shape, count, dtype):
    """The same run, cut. Returns this rank's pieces of weights and state; checks bytes sent and held against `cost`."""
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    weights, steps = tensors(shape, count, dtype)
    parameters = [nn.Parameter(place(w, mesh, case)) for w in weights]
    group = None if case.places else mesh.get_group()
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    optimizer = RuleOptimizer(
        named, process_group=group, **{"replica_compute": "split", "shard_compute": "in_place", **options}
    )
    optimizer.initialize_state()
    before = optimizer.bytes_sent
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = place(gradient, mesh, case)
        optimizer.step()
    sent, plan = optimizer.bytes_sent - before, optimizer.plan()
    cost = step_cost(plan, optimizer.param_groups)
    predicted = STEPS * (cost.wire + agreement_bytes(plan)) + comparison_bytes(plan)
    if options.get("decay") == "hyperball":  # whether a matrix starts at zero: a number each, and one a parameter
        asked = [
            (update.matrices, axis) for b in plan.buckets for update in b.updates for axis in update.part.over("both")
        ]
        asked += [(len(members), axis) for axes, members in plan.meshes for axis in axes]
        predicted += sum(all_reduce_bytes(8 * numbers, axis.size) for numbers, axis in asked)
    assert sent == predicted, f"rank {rank} sent {sent} bytes, predicted {predicted}"
    held = sum(local(v).numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    assert held == cost.state, f"rank {rank} holds {held} bytes of state, predicted {cost.state}"
    return [(local(p), {k: local(v) for k, v in optimizer.state[p].items()}) for p in parameters]


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def state_cut(whole, name, case: Case, coordinates, options, shape):
    """This rank's piece of a state tensor: a dimension is cut as that of the weight which the rule says it follows."""
    kind = KNOWN[options["rule"]]
    rule = kind(**{key: value for key, value in options.items() if key in kind.options()})
    dims = rule.slots(shape[-2:], torch.float64)[name].dims
    batch = whole.ndim - len(dims)
    place = {**{dim: dim for dim in range(batch)}, len(shape) - 2: "rows", len(shape) - 1: "columns"}
    place |= {dim: batch + dims.index(side) for dim, side in place.items() if side in dims}
    order = tuple((axis, place[dim]) for axis, dim in case.order if isinstance(place[dim], int))
    return cut(whole, Case(case.mesh, case.places, order), coordinates)


def errors(rank, case: Case, options, shape, count, dtype):
    """Runs `many_ranks` and returns what is wrong with this rank, in words."""
    expected = one_process({**options, "shard_state": "none"}, shape, count, dtype)
    results = many_ranks(rank, case, options, shape, count, dtype)
    shape_of_mesh = torch.arange(case.world).view(case.mesh)
    coordinates = (shape_of_mesh == rank).nonzero()[0].tolist()
    wrong = []
    for i, ((weight, state), (whole, whole_state)) in enumerate(zip(results, expected, strict=True)):
        pairs = {"weight": (weight, cut(whole, case, coordinates), whole)}
        for name, value in state.items():
            pairs[name] = (
                value,
                state_cut(whole_state[name], name, case, coordinates, options, shape),
                whole_state[name],
            )
        for name, (got, want, scale) in ((name, [x.double() for x in three]) for name, three in pairs.items()):
            if got.shape != want.shape:
                wrong.append(f"rank {rank}, w{i}: {name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
            elif got.numel() and not (got - want).norm() <= TOLERANCE[dtype] * scale.norm():
                wrong.append(f"rank {rank}, w{i}: {name} is off by {(got - want).norm() / scale.norm():.1e}")
    return wrong
