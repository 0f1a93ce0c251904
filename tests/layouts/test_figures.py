"""The same figures on every layout as in one process, on simulated ranks; and the same weights, watched or not."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from table import EXPERT_LAYOUTS, LAYOUTS, RULES, in_turn, local, place, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from view_table import VIEWS

from orthoshard import RuleOptimizer
from simulate import simulate


def run(members, placed, watching, group=None, steps=2):
    """``members``: (shape, options) of a parameter each, alone in its group. One optimizer for all."""
    whole = [tensors(shape, 1, torch.float64, seed=i) for i, (shape, _) in enumerate(members)]
    parameters = [nn.Parameter(placed(weights[0])) for weights, _ in whole]
    named = enumerate(zip(parameters, members, strict=True))
    groups = [{"params": [(f"w{i}", p)], **options} for i, (p, (_, options)) in named]
    optimizer = RuleOptimizer(groups, process_group=group)
    for step in range(steps):
        optimizer.record_diagnostics(watching and step == steps - 1, spectra=True)
        for parameter, (_, gradients) in zip(parameters, whole, strict=True):
            parameter.grad = placed(gradients[step][0])
        optimizer.step()
    return optimizer, parameters


def same(here, there, where):
    assert here.keys() == there.keys()
    for name, figures in here.items():
        for (key, mine), whole in zip(asdict(figures).items(), asdict(there[name]).values(), strict=True):
            if key == "spectrum":
                assert mine == pytest.approx(whole, abs=1e-9), f"{where}, {name}, {key}"
            elif mine is None or whole is None:
                assert mine is whole, f"{where}, {name}, {key}"
            else:
                assert math.isclose(mine, whole, rel_tol=1e-8, abs_tol=1e-12), (
                    f"{where}, {name}, {key}: {mine}, {whole}"
                )


def check(case, members, **many):
    """``many``: options that make sense on many ranks only."""
    alone, _ = run(members, torch.clone, True)
    simulate(case.world, ranks, case, [(shape, {**options, **many}) for shape, options in members], alone.diagnostics())


def ranks(rank, case, members, figures):
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    group = None if case.places else mesh.get_group()

    def placed(w):
        return place(w, mesh, case)

    optimizer, weights = run(members, placed, True, group)
    same(optimizer.diagnostics(), figures, f"rank {rank}")
    if members[0][0] == SHAPE:
        _, others = run(members, placed, False, group)
        dealt = any(update.dealt for bucket in optimizer.plan().buckets for update in bucket.updates)
        for mine, theirs in zip(weights, others, strict=True):
            if dealt:  # U may come back formed; figures ask for its factors
                torch.testing.assert_close(local(mine), local(theirs), rtol=0, atol=1e-12)
            else:
                assert torch.equal(local(mine), local(theirs)), f"rank {rank}: watching has changed the weights"


SHAPE = (13, 7)
CHOSEN = [RULES[name] for name in ("dion 1/2", "dion columns", "dion_tail 1/4", "muon")]


PAIRS = {"rows": CHOSEN[::2], "columns": CHOSEN[1::2]}


@pytest.mark.parametrize(("rules", "case"), in_turn(PAIRS, LAYOUTS, 2))
def test_matrices(rules, case):
    check(case, [*((SHAPE, rule) for rule in rules), ((3, 10), rules[0])])


@pytest.mark.parametrize(("rules", "case"), in_turn(PAIRS, EXPERT_LAYOUTS, 2))
def test_experts_are_one_parameter(rules, case):
    check(case, [*(((3, 6, 4), rule) for rule in rules), ((5, 3, 8), rules[0])])


OWNERS = ["ddp x3", "hsdp 2x2", "replicas 2, fsdp 2, tp 2"]


@pytest.mark.parametrize("case", [LAYOUTS[name] for name in OWNERS], ids=OWNERS)
def test_each_replica_keeps_the_state_of_its_own(case):
    members = [(SHAPE, RULES[name]) for name in ("dion 1/2", "dion columns", "muon") for _ in range(2)]
    check(case, members, shard_state="zero1")


FEW = ["fsdp x3", "row-wise tp x2", "ddp x2"]


@pytest.mark.parametrize("case", [LAYOUTS[name] for name in FEW], ids=FEW)
def test_the_blocks_of_a_view_are_one_parameter(case):
    """Whether they are a batch, pieces of any length, or nothing at all on some rank."""
    check(case, [(row.shape, {**RULES["dion 1/2"], "view": row.text}) for row in VIEWS.values()])


@pytest.mark.parametrize("sync", ["factors", "gradients"])
def test_replicas_with_gradients_of_their_own_show_their_mean(sync):
    """The momenta differ between replicas; what is shown is what one process with the mean gradient shows."""
    shape, options = (9, 6), RULES["dion 1/2"]

    def gradient(replica, step):
        return torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + replica), dtype=torch.float64)

    def train(optimizer, p, draw):
        optimizer.record_diagnostics(spectra=True)
        for step in range(3):
            p.grad = draw(step)
            optimizer.step()
        return optimizer.diagnostics()

    def replicas(rank):
        mesh = init_device_mesh("cpu", (2,))
        p, q = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
        own = RuleOptimizer([("w", p)], process_group=mesh.get_group(), replica_sync=sync, **options)
        mine = train(own, p, lambda step: gradient(rank, step))
        whole = train(RuleOptimizer([("w", q)], **options), q, lambda step: (gradient(0, step) + gradient(1, step)) / 2)
        same(mine, whole, f"rank {rank}")

    simulate(2, replicas)


def test_where_one_rank_watches_all_do_and_none_waits_for_ever():
    def curious(rank):
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(place(torch.ones(6, 4), mesh, LAYOUTS["fsdp x2"]))
        optimizer = RuleOptimizer([("w", p)])
        optimizer.record_diagnostics(rank == 1)
        p.grad = place(torch.eye(6, 4), mesh, LAYOUTS["fsdp x2"])
        optimizer.step()
        return optimizer.diagnostics()

    first, second = simulate(2, curious)
    assert first == second
    assert first["w"].captured == pytest.approx(0.25)  # one of four equal singular values
