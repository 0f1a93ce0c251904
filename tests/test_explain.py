"""`explain()` says of every parameter what happens to it and why, and what a step costs."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn

from orthoshard import Dion, param_groups, plan


def model():
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32))


def test_every_parameter_has_one_line_with_its_reason():
    net = model()
    table = Dion(net, lr=0.02, rank_fraction=0.25, weight_decay=0.1).explain().splitlines()
    names = [name for name, _ in net.named_parameters()]
    blank = table.index("")
    assert sorted(line.split()[0] for line in table[1:blank]) == sorted(names)
    assert [line.split(" under ")[0] for line in table[blank + 1 : -1]] == ["1 64×16", "1 16×64"]
    lines = {line.split()[0]: line for line in table[1:blank]}
    expected = "64×16 matrix dion r=4 0.02 0.1 whole a matrix that multiplies activations"
    assert lines["1.weight"].split()[1:] == expected.split()
    assert "embedding" in lines["0.weight"]
    assert "adamw" in lines["0.weight"]
    assert "head" in lines["4.weight"]
    assert " 0.02 " in lines["1.bias"]


def test_repr_has_a_line_for_groups_that_are_alike():
    """And `explain()` and `plan()` are read without print, too."""
    optimizer = Dion(model(), lr=0.02, state_dtype="bfloat16")
    assert repr(optimizer).splitlines() == [
        "Dion(",
        "  2 × embedding, head: adamw(lr=0.02, betas=(0.95, 0.98))",
        "  2 × matrix: dion(lr=0.02, state_dtype=bfloat16)",
        "  3 × bias: adamw(lr=0.02)",
        ")",
    ]
    assert repr(optimizer.explain()) == str(optimizer.explain())
    assert str(optimizer.plan()) == "7 parameters in 5 buckets, with 2 matrices"
    net = model()
    each = Dion([{"params": [p], "lr": torch.tensor(0.01)} for p in net.parameters() if p.ndim == 2], momentum=0.9)
    assert repr(each).splitlines() == ["Dion(", "  4 × parameters: dion(lr=0.01, momentum=0.9)", ")"]


def test_the_cost_line_counts_state_and_flops_by_hand():
    """16 x 64 at rank 4: momentum and Q (64, 4) and (16, 4); four products of 2 m n r; P (16, 4) and (64, 4), each by
    one pass of 4 p r² + 4/3 r³ and some of r² for what its columns are judged by."""
    matrices = [("a", nn.Linear(16, 64, bias=False).weight), ("b", nn.Linear(64, 16, bias=False).weight)]
    last = Dion(matrices, rank_fraction=0.25).explain().splitlines()[-1]
    state = 4 * (2 * 16 * 64 + 64 * 4 + 16 * 4)
    flops = 2 * 4 * (2 * 16 * 64 * 4) + 4 * 16 * 16 + 4 * 64 * 16 + 2 * 4 / 3 * 64
    assert f"{state / 1e6:.3g} MB" in last
    assert float(last.split(" GFLOP")[0].split()[-1]) * 1e9 == pytest.approx(flops, rel=0.01)
    assert "sends 0 MB" in last


def test_what_is_alike_is_one_line():
    """Layers, experts within layers, those of one layer apart, slices of one parameter; and each for itself."""
    named = [(f"layers.{i}.experts.{j}.w", nn.Parameter(torch.ones(8, 4))) for i in range(3) for j in range(2)]
    named += [(f"layers.3.experts.{j}.w", nn.Parameter(torch.ones(8, 4))) for j in (0, 2, 3)]
    named += [("layers.3.wide", nn.Parameter(torch.ones(4, 8))), ("stack", nn.Parameter(torch.ones(64, 16, 16)))]
    with patch.object(plan, "BUCKET_BYTES", 4096):
        optimizer = Dion(named)
        short, long = optimizer.explain().splitlines(), optimizer.explain(every=True).splitlines()
    blank = short.index("")
    assert [line.split()[0] for line in short[1:blank]] == [
        "layers.{0..2}.experts.{0..1}.w", "layers.3.experts.{0,2..3}.w", "layers.3.wide", "stack",
    ]  # fmt: skip
    starts = [line.split(":")[0] for line in short[blank + 1 : -1]]
    assert starts == ["9 8×4 under dion", "1 4×8 under dion", "64 16×16 in 16 updates under dion"]
    assert [line.split()[0] for line in long[1 : long.index("")]] == [name for name, _ in named]
    assert [line.split(":")[0] for line in long].count("4 16×16 under dion") == 16
    assert short[-1] == long[-1]


def test_param_groups_hand_over_their_reasons_and_rates():
    groups = param_groups(model(), scalar="lion", lr=0.04, rank_fraction=0.5)
    by_role = {group["role"]: group for group in groups}
    assert by_role["matrix"]["lr"] == 0.04
    assert by_role["matrix"]["rank_fraction"] == 0.5
    assert by_role["bias"]["rule"] == "lion"
    assert abs(by_role["bias"]["lr"] - 0.04 / 3) < 1e-12
    assert all(group["reason"] for group in groups)
    assert Dion(groups)
