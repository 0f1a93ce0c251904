"""BatchedCall steps done for several buckets at once: fewer calls, the same updates, on every layout.

As on an accelerator, where the host reads nothing: then every orthonormalization takes the same steps, and ranks
without a matrix must take them as well, so that all issue their collectives in one order.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from table import LAYOUTS, TOLERANCE, cut, in_turn, local, place, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from orthoshard import RuleOptimizer, plan
from orthoshard.directions import polar as polar_direction
from orthoshard.engine import batcher
from orthoshard.linalg.host_sync import no_host_sync
from orthoshard.linalg.polar import polar
from orthoshard.linalg.small import run_batched
from simulate import simulate

# A bucket each, all of rank 3: more of them than are in flight at a time. One matrix each, so that owners have none.
SHAPES = [(8, 6), (6, 8), (6, 6), (13, 6), (6, 24), (7, 6)]
RULES = {
    "dion": {"rule": "dion", "rank_fraction": 0.5},
    "dion, two ranks": {"rule": "dion", "rank_fraction": 0.4, "q_side": "columns"},
    "dion_tail": {"rule": "dion_tail", "rank_fraction": 0.5},
}
DTYPE, STEPS = torch.float64, 2


def drawn():
    pairs = [tensors(shape, 1, DTYPE, seed=number) for number, shape in enumerate(SHAPES)]
    return [weights[0] for weights, _ in pairs], [[steps[s][0] for _, steps in pairs] for s in range(STEPS)]


def trained(parameters, gradients, **options):
    optimizer = RuleOptimizer([(f"w{i}", p) for i, p in enumerate(parameters)], **options)
    with no_host_sync():
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return optimizer


def alone(options):
    """Weights of a process where every step is done by itself."""
    weights, gradients = drawn()
    parameters = [nn.Parameter(weight) for weight in weights]
    with patch.object(batcher, "run_batched", lambda steps: [step.done() for step in steps]):
        trained(parameters, gradients, **options)
    return [p.detach() for p in parameters]


def many(rank, case, options, expected):
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    weights, gradients = drawn()
    parameters = [nn.Parameter(place(w, mesh, case)) for w in weights]
    placed = [[place(g, mesh, case) for g in step] for step in gradients]
    group = None if case.places else mesh.get_group()
    trained(parameters, placed, process_group=group, replica_compute="split", **options)
    at = mesh.get_coordinate()
    worst = 0.0
    for parameter, whole in zip(parameters, expected, strict=True):
        got, want = local(parameter), cut(whole, case, at)
        assert got.shape == want.shape
        worst = max(worst, float((got - want).norm() / whole.norm()))
    return worst


@pytest.mark.parametrize(("options", "case"), in_turn(RULES, LAYOUTS, 3))
def test_every_layout_equals_one_process_that_joins_nothing(options, case):
    assert max(simulate(case.world, many, case, options, alone(options))) <= TOLERANCE[DTYPE]


@pytest.mark.parametrize("bucket", [None, 1], ids=["small", "full"])
@pytest.mark.parametrize("name", ["dion", "dion, two ranks", "dion_tail"])
def test_buckets_in_flight_share_their_steps(name, bucket, monkeypatch):
    """Six small buckets are in flight together, or four full ones: each kind of step is done once, or twice, not six
    times, in every step; once more for another rank."""
    done = []

    def counting(steps):
        done.append(len(steps))
        return run_batched(steps)

    if bucket:
        monkeypatch.setattr(plan, "BUCKET_BYTES", bucket)
    weights, gradients = drawn()
    parameters = [nn.Parameter(weight) for weight in weights]
    with patch.object(batcher, "run_batched", counting):
        trained(parameters, gradients[:1], **RULES[name])
    together = 4 if bucket else len(SHAPES)
    ranks = 2 if name == "dion, two ranks" else 1
    kinds = sum(done) / len(SHAPES)
    assert len(done) <= (-(-len(SHAPES) // together) + ranks - 1) * kinds
    assert max(done) == together


def test_where_the_host_looks_nothing_is_joined():
    weights, gradients = drawn()
    parameters = [nn.Parameter(weight) for weight in weights]
    optimizer = RuleOptimizer(parameters, rule="dion")
    with patch.object(batcher, "run_batched", side_effect=AssertionError):
        for parameter, gradient in zip(parameters, gradients[0], strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("name", ["ddp x3", "fsdp x4", "hsdp 3x2", "fsdp 2, row-wise tp 2"])
def test_owners_without_a_matrix_send_the_dtype_of_a_narrower_polar_factor(name):
    """As on a device, where it stays in the 16 bits of its iteration: ranks that send another dtype do not meet."""
    options = {"rule": "muon"}
    with patch.object(polar_direction, "polar", lambda x, *_, **options: polar(x, **options).float()):
        expected = alone(options)
        assert max(simulate(LAYOUTS[name].world, many, LAYOUTS[name], options, expected)) < 1e-6  # float32's rounding
