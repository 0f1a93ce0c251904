"""Layout independence: every rule, on every layout, equals its one-process run.

On simulated ranks, in float64 and float32; bytes sent and state held are what `cost` says, to the byte.
"""

from __future__ import annotations

import pytest
import torch
from simulate import simulate
from table import EXPERT_LAYOUTS, EXPERT_SHAPES, LAYOUTS, RULES, SHAPES, cut, errors, local, place, tensors
from torch.distributed.device_mesh import init_device_mesh

from orthoshard import RuleOptimizer
from orthoshard.engine.comm import Comm
from orthoshard.layout import mesh_axes

# Three matrices: a batch that no mesh of the table divides, so that owners get different numbers of them.
COUNT = 3


def check(case, options, shape):
    for dtype in (torch.float64, torch.float32):
        wrong = simulate(case.world, errors, case, options, shape, COUNT, dtype)
        assert not any(wrong), "\n".join(line for lines in wrong for line in lines)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_matrices(options, case, shape):
    check(case, options, shape)


@pytest.mark.parametrize("shape", EXPERT_SHAPES.values(), ids=EXPERT_SHAPES)
@pytest.mark.parametrize("case", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS)
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_experts(options, case, shape):
    check(case, options, shape)


def many_shapes(rank, case, options, shapes):
    """Buckets of several shapes and sizes in one optimizer, for owners and replicas that get different shares."""
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    group = None if case.places else mesh.get_group()
    whole = [w for i, shape in enumerate(shapes) for w in tensors(shape, 1 + i % 2, torch.float64, seed=i)[0]]
    runs = []
    for placed, over in ((lambda w: place(w, mesh, case), group), (torch.clone, None)):
        parameters = [torch.nn.Parameter(placed(w)) for w in whole]
        optimizer = RuleOptimizer([(f"w{i}", p) for i, p in enumerate(parameters)], process_group=over, **options)
        for step in range(3):
            for i, p in enumerate(parameters):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = placed(torch.randn(whole[i].shape, generator=generator, dtype=torch.float64))
            optimizer.step()
        runs.append([local(p) for p in parameters])
    coordinates = mesh.get_coordinate()
    for i, (piece, p) in enumerate(zip(*runs, strict=True)):
        assert torch.allclose(piece, cut(p, case, coordinates), rtol=0, atol=1e-9), f"rank {rank}, w{i}"


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rule", ["dion 1/2", "muon"])
def test_many_buckets_in_flight(rule, case):
    simulate(case.world, many_shapes, case, RULES[rule], [*SHAPES.values(), (9, 9)])


@pytest.mark.parametrize("case", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS)
@pytest.mark.parametrize("rule", ["dion 1/2", "muon"])
def test_many_expert_buckets_in_flight(rule, case):
    simulate(case.world, many_shapes, case, RULES[rule], [(1, 4, 4), (5, 4, 6), (2, 3, 3), (3, 7, 2), (1, 2, 9)])


def test_the_simulation_fails_where_ranks_ask_different_things():
    def different(rank):
        (axis,) = mesh_axes("w", init_device_mesh("cpu", (2,)))
        Comm().all_reduce(torch.zeros(1 + rank), axis).wait()

    with pytest.raises(AssertionError):
        simulate(2, different)
