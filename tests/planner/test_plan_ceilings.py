"""Temporaries of a step on the meshes of large models: under a ceiling by the plan, and the plan's on every rank."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from orthoshard import layout
from orthoshard.engine import dryrun
from orthoshard.engine.batcher import CallBatcher
from orthoshard.engine.driver import update
from orthoshard.engine.run import run
from orthoshard.engine.transport import Transport
from orthoshard.groups import group_rule
from orthoshard.lab.plan.count import counted
from orthoshard.lab.plan.subject import subject
from orthoshard.linalg.host_sync import simulating
from orthoshard.stages import Batch

CEILINGS = [
    ("llama3-8b", 64, 2e9),
    pytest.param("llama3-70b", 64, 4e9, marks=pytest.mark.slow),
    ("llama3-405b", 512, 4e9),
]
# An owner of every bucket, one that starts later, and one that owns nothing of most where matrices are few.
RANKS = (0, 40, 63)


@pytest.mark.parametrize(("model", "ranks", "most"), CEILINGS)
def test_temporaries_stay_under_a_ceiling_at_a_sixteenth_and_under_two_at_a_quarter(model, ranks, most):
    chosen = subject(model, torch.bfloat16)
    for rule in ("dion", "dion_tail"):
        for fraction, times in ((1 / 16, 1), (1 / 4, 2)):
            with chosen.placed({"fsdp": ranks}) as placed:
                plan, groups = placed.plan(rule, rank_fraction=fraction)
                assert counted(plan, groups, 1).here.temporaries <= times * most, (rule, fraction)


@pytest.mark.parametrize("rule", ["muon", "dion"])
def test_the_mean_over_ranks_is_of_the_experts_that_each_has(rule):
    """Eight experts on eight ranks: every rank has as much to do."""
    with subject("mixtral-8x7b", torch.bfloat16).placed({"fsdp": 8}) as placed:
        found = counted(*placed.plan(rule), 1)
    assert found.mean.flops == pytest.approx(found.here.flops, rel=0.1)


def whole_step(plan, groups):
    """The peak of all updates of a step as they are in flight together, run dry as on this rank."""
    meter, comm, batcher = dryrun.Meter("cuda"), dryrun.DryComm(), CallBatcher()

    def tasks():
        for bucket in plan.buckets:
            for work in bucket.updates:
                rule, dtype = replace(group_rule(groups[bucket.group]), lr=1.0), bucket.entries[0].dtype
                part, count = work.part, bucket.local_count(work)
                with _disable_current_modes():  # what is there before the step
                    shape = (count, part.rows.local_length, part.columns.local_length)
                    weights, gradients = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
                    state = {
                        name: torch.empty(count, *dryrun._local(slot, part), dtype=slot.dtype, device="meta")
                        for name, slot in rule.slots(part.matrix, dtype).items()
                    }
                batch = Batch([weights], [weights], [gradients], state, part.matrix)
                transport = Transport(part, comm, batcher, work.first_owner, work.replicas, bucket.shares(work))
                yield update(rule, batch, transport, work.dealt), work.peak

    with dryrun._ALONE, simulating("cuda", meter.once), meter:
        run(tasks())
    return meter.count.peak


@pytest.mark.parametrize(("rule", "way"), [("dion", "in_place"), ("dion_tail", "dealt")])
def test_no_rank_holds_more_in_a_whole_step_than_the_plan_says(rule, way, monkeypatch):
    chosen, axes = subject("llama3-8b", torch.bfloat16), layout.mesh_axes
    found = []
    for rank in RANKS:
        there = partial(replace, coordinate=rank)
        monkeypatch.setattr(layout, "mesh_axes", lambda *of, there=there: [there(axis) for axis in axes(*of)])
        with chosen.placed({"fsdp": 64}) as placed:
            plan, groups = placed.plan(rule, rank_fraction=1 / 16, shard_compute=way)
            assert {axis.coordinate for entry in plan.entries for axis in entry.layout.axes} == {rank}
            found.append((whole_step(plan, groups), counted(plan, groups, 1).here.temporaries))
    assert len({planned for _, planned in found}) == 1, "every rank plans for any"
    for held, planned in found:
        assert planned / 4 < held <= planned
