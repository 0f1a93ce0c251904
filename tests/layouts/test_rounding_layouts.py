"""Stochastic rounding gives an entry the same random bits on every layout: bfloat16 weights come out the same."""

from __future__ import annotations

import pytest
import torch
from table import EXPERT_LAYOUTS, LAYOUTS, cut, local, place, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from orthoshard import RuleOptimizer
from simulate import simulate

COUNT = 3
LAYOUT_NAMES = ("ddp x2", "fsdp x3", "hsdp 2x2", "row-wise tp x2", "fsdp 2 within column-wise tp 2")
RULES = {
    "dion": {"rule": "dion", "rank_fraction": 0.5},
    "dion_tail": {"rule": "dion_tail", "rank_fraction": 0.5},
    "muon": {"rule": "muon"},
    "adamw": {"rule": "adamw"},
    "lion": {"rule": "lion"},
}
# Of a unit of the last place of a weight near 1, 1/128: what a step moves it by is kept or lost by chance alone.
LR = {"dion": 4e-3, "dion_tail": 2e-3, "muon": 2e-3, "adamw": 1e-3, "lion": 1e-3}
# The sums of cut products differ from whole ones by some 1e-7 of a weight, a part in 1e5 of its unit: hardly one entry
# in a thousand falls otherwise.
OTHERWISE = 0.01


def ran(weights, steps, placed, group, options, rounding="stochastic"):
    parameters = [nn.Parameter(placed(w)) for w in weights]
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    optimizer = RuleOptimizer(named, process_group=group, rounding=rounding, lr=LR[options["rule"]], **options)
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = placed(gradient)
        optimizer.step()
    return [local(p) for p in parameters]


def fell_otherwise(rank, case, options, shape, view):
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
    weights, steps = tensors(shape, COUNT, torch.bfloat16, steps=5)
    weights = [w / w.abs().clamp(min=0.1) for w in weights]
    group = None if case.places else mesh.get_group()
    options = {**options, "view": view}
    mine = ran(weights, steps, lambda w: place(w, mesh, case), group, options)
    alone = {k: v for k, v in options.items() if k != "shard_state"}
    whole = ran(weights, steps, torch.clone, None, alone)
    nearest = ran(weights, steps, torch.clone, None, alone, "nearest")
    coordinates = mesh.get_coordinate()
    wrong = sum(int((a != cut(b, case, coordinates)).sum()) for a, b in zip(mine, whole, strict=True))
    moved = sum(int((a != b).sum()) for a, b in zip(whole, nearest, strict=True))
    return wrong, sum(a.numel() for a in mine), moved / sum(a.numel() for a in whole)


def check(case, options, shape, view="whole"):
    found = simulate(case.world, fell_otherwise, case, options, shape, view)
    wrong, entries = sum(each[0] for each in found), sum(each[1] for each in found)
    assert found[0][2] > 0.3, "nothing was left to chance: the test could not fail"
    assert wrong <= OTHERWISE * entries, (wrong, entries)


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_matrices(rule, name):
    check(LAYOUTS[name], RULES[rule], (22, 14))


@pytest.mark.parametrize("rule", ["dion", "muon"])
@pytest.mark.parametrize("name", ["experts x2", "expert rows x3", "expert columns x2"])
def test_experts(rule, name):
    check(EXPERT_LAYOUTS[name], RULES[rule], (3, 12, 8))


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        ("rows:10,6,6", (22, 14)),
        ("rows:4*5", (20, 14)),
        ("rows:2*(3,7)", (20, 14)),
        ("transposed columns:10,12", (22, 14)),
        ("conv", (12, 3, 2, 2)),
    ],
)
def test_views(view, shape):
    check(LAYOUTS["fsdp x3"], RULES["muon"], shape, view)


@pytest.mark.parametrize("rule", ["dion", "muon"])
def test_owners_of_state(rule):
    check(LAYOUTS["ddp x3"], {**RULES[rule], "shard_state": "zero1"}, (22, 14))
