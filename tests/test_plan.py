"""Buckets: what is updated together, and how large it gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orthoshard.plan
from orthoshard import Dion, RuleOptimizer
from orthoshard.budget import update_dry
from orthoshard.groups import group_rule


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (6, 4), (2, 6, 4), (6, 4)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups_of(optimizer):
    return [[entry.index for entry in bucket.entries] for bucket in optimizer.plan().buckets]


def test_matrices_of_one_shape_are_one_bucket_and_stacks_of_them_too():
    assert groups_of(Dion(parameters())) == [[0, 2, 3, 4, 5], [1]]


def test_dtypes_and_groups_do_not_mix():
    one, two, three = parameters()[0], nn.Parameter(torch.zeros(6, 4).double()), parameters()[2]
    optimizer = Dion([{"params": [one, two]}, {"params": [three], "lr": 0.5}])
    assert [(b.group, [e.index for e in b.entries]) for b in optimizer.plan().buckets] == [(0, [0]), (0, [1]), (1, [0])]


def test_buckets_are_capped_and_the_cap_changes_no_result(monkeypatch):
    whole, capped = parameters(), parameters()
    first = Dion([(f"w{i}", p) for i, p in enumerate(whole)])
    for _ in range(3):
        for p in whole:
            p.grad = p.detach().sin()
        first.step()
    monkeypatch.setattr(orthoshard.plan, "BUCKET_BYTES", 2 * 6 * 4 * 4)
    second = Dion([(f"w{i}", p) for i, p in enumerate(capped)])
    assert groups_of(second) == [[0, 2], [3], [4], [5], [1]]
    for _ in range(3):
        for p in capped:
            p.grad = p.detach().sin()
        second.step()
    assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(whole, capped, strict=True))


def test_one_matrix_larger_than_the_cap_is_a_bucket_of_its_own(monkeypatch):
    monkeypatch.setattr(orthoshard.plan, "BUCKET_BYTES", 1)
    assert groups_of(Dion(parameters())) == [[0], [2], [3], [4], [5], [1]]


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
def test_a_stack_larger_than_the_cap_is_worked_on_in_slices(monkeypatch, rule):
    """The same steps; the temporaries are those of a slice."""

    def train():
        stack = nn.Parameter(torch.randn(7, 8, 6, generator=torch.Generator().manual_seed(0)).bfloat16())
        optimizer = RuleOptimizer([("w", stack)], rule=rule, rounding="stochastic")
        optimizer.record_diagnostics()
        for _ in range(3):
            stack.grad = stack.detach().sin()
            optimizer.step()
        (bucket,) = optimizer.plan().buckets
        group = optimizer.param_groups[0]
        peak = max(update_dry(bucket, update, group_rule(group)).peak for update in bucket.updates)
        return stack.detach(), optimizer.diagnostics()["w"], len(bucket.updates), peak

    whole, figures, one, peak = train()
    monkeypatch.setattr(orthoshard.plan, "BUCKET_BYTES", 2 * 8 * 6 * 2)
    sliced, others, four, smaller = train()
    assert (one, four) == (1, 4)
    assert smaller <= 0.4 * peak
    assert torch.allclose(whole, sliced, rtol=0, atol=2e-2)
    assert (whole == sliced).float().mean() > 0.97
    assert (figures.matrices, figures.update_rms) == (others.matrices, pytest.approx(others.update_rms, rel=1e-3))
