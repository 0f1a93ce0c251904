"""Layout independence: every rule, on every layout, equals its one-process run.

On simulated ranks, in float64 and float32; bytes sent and state held are what `cost` says, to the byte.
"""

from __future__ import annotations

import pytest
import torch
from simulate import simulate
from table import EXPERT_LAYOUTS, EXPERT_SHAPES, LAYOUTS, RULES, SHAPES, errors
from torch.distributed.device_mesh import init_device_mesh

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


def test_the_simulation_fails_where_ranks_ask_different_things():
    def different(rank):
        (axis,) = mesh_axes("w", init_device_mesh("cpu", (2,)))
        Comm().all_reduce(torch.zeros(1 + rank), axis).wait()

    with pytest.raises(AssertionError):
        simulate(2, different)
