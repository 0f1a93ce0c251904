"""A rank that dies in the middle of a step: the others stop with an error that names what they waited for."""

from __future__ import annotations

import os
import time

import pytest
import torch
from table import LAYOUTS, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from orthoshard import RuleOptimizer
from orthoshard.engine.comm import Comm
from processes import run_processes

TIMEOUT = 10


def dies_in_step(rank, case, collective, options):
    """Rank 1 exits on its ``collective``-th collective of the third step."""
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    p = [nn.Parameter(place(torch.eye(6) + i, mesh, case)) for i in range(3)]
    group = None if case.places else mesh.get_group()
    optimizer = RuleOptimizer([(f"w{i}", w) for i, w in enumerate(p)], process_group=group, **options)
    start = Comm._start

    def counting(self, what, axis, call):
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)
        return start(self, what, axis, call)

    for step in range(3):
        for w in p:
            w.grad = torch.ones_like(w) + rank
        if rank == 1 and step == 2:
            left = collective
            Comm._start = counting
        began = time.monotonic()
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error), time.monotonic() - began
    return "nothing happened", 0.0


@pytest.mark.parametrize("rule", ["dion", "muon"])
@pytest.mark.parametrize("collective", [1, 2, 3])
def test_the_others_stop_with_an_error(rule, collective):
    check("fsdp x3", collective, {"rule": rule}, "a=3")


@pytest.mark.parametrize(("sync", "collective"), [("factors", 2), ("factors", 3), ("gradients", 2)])
def test_replicas_that_average_stop_too(sync, collective):
    check("ddp x3", collective, {"replica_sync": sync}, "replicas=3")


def check(layout, collective, options, axis):
    job = (dies_in_step, (LAYOUTS[layout], collective, options))
    (results,) = run_processes(3, [job], group_timeout=TIMEOUT, die=1)
    assert results[1] is None
    for rank in (0, 2):
        sentence, seconds = results[rank]
        assert "the optimizer" in sentence, sentence
        assert f" over {axis}" in sentence
        assert seconds < TIMEOUT + 5
