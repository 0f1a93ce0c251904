"""What the planner says of a rank is what happens there, on every layout: collectives, their bytes, and state."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from table import EXPERT_LAYOUTS, EXPERT_SHAPES, LAYOUTS, RULES, SHAPES, R, in_turn, local, place, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from orthoshard import RuleOptimizer
from orthoshard.engine.comm import Comm
from orthoshard.lab.plan.count import counted
from simulate import simulate

CASES = {**{f"{name}, matrices": (case, SHAPES["prime"]) for name, case in LAYOUTS.items()}}
CASES |= {f"{name}, experts": (case, EXPERT_SHAPES["experts"]) for name, case in EXPERT_LAYOUTS.items()}
REPLICATED = {name: row for name, row in CASES.items() if R in row[0].places or not row[0].places}


class ByAxis(Comm):
    """Counts what is sent over each axis, and keeps what each collective sends."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()
        self.messages = []

    def all_reduce(self, x, axis, op="sum"):
        return self._noted(axis, super().all_reduce, x, axis, op)

    def all_to_all(self, out, x, receive, send, axis):
        return self._noted(axis, super().all_to_all, out, x, receive, send, axis)

    def reduce_scatter(self, out, x, axis):
        return self._noted(axis, super().reduce_scatter, out, x, axis)

    def all_gather(self, out, x, axis):
        return self._noted(axis, super().all_gather, out, x, axis)

    def _noted(self, axis, call, *arguments):
        bytes_before, calls_before = self.bytes, self.calls
        pending = call(*arguments)
        self.sent[axis.name] += self.bytes - bytes_before
        self.messages += [float(self.bytes - bytes_before)] * (self.calls - calls_before)
        return pending


def check(rank, case, options, shape):
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    weights, steps = tensors(shape, 3, torch.float32)
    parameters = [nn.Parameter(place(w, mesh, case)) for w in weights]
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    optimizer = RuleOptimizer(named, process_group=None if case.places else mesh.get_group(), **options)
    for gradients in steps[:2]:
        optimizer._comm = comm = ByAxis()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = place(gradient, mesh, case)
        optimizer.step()
    planned = counted(optimizer.plan(), optimizer.param_groups, 1)
    found = planned.here
    assert sorted(planned.messages) == sorted(comm.messages), f"rank {rank}"
    sent = {"dp" if name == "replicas" else name: float(size) for name, size in comm.sent.items() if size}
    assert {name: size for name, size in found.sent.items() if size} == sent, f"rank {rank}"
    held = sum(local(v).numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    assert found.state == held, f"rank {rank}"
    return comm.bytes


@pytest.mark.parametrize(
    ("options", "case"), in_turn({r: RULES[r] for r in ("dion columns", "dion_tail 1/4", "muon")}, CASES, 2)
)
def test_bytes_of_every_rank_by_axis(options, case):
    sent = simulate(case[0].world, check, case[0], options, case[1])
    assert all(isinstance(size, Fraction) for size in sent)
    assert sum(sent) > 0


@pytest.mark.parametrize("way", [{"replica_compute": "repeat"}, {"shard_state": "zero1"}])
@pytest.mark.parametrize(("options", "case"), in_turn({r: RULES[r] for r in ("dion 1/2", "muon")}, REPLICATED, 2))
def test_bytes_of_every_way_of_replicas(options, case, way):
    simulate(case[0].world, check, case[0], {**options, **way}, case[1])
