"""The choice between sharing out work over replicas and repeating it, by hand."""

from __future__ import annotations

import pytest
import torch
from orthoshard.rules.dion import DionRule
from orthoshard.rules.muon import MuonRule

from orthoshard.cost import FLOPS_PER_BYTE, FLOPS_PER_BYTE_ELSEWHERE, at_replicas, routes, worth_averaging
from orthoshard.layout import Axis, Layout
from orthoshard.parts import Part, parts_of
from orthoshard.views import read_view


def axis(name: str, size: int, coordinate: int = 0) -> Axis:
    return Axis((name,), name, size, coordinate)


def whole(layout: Layout) -> Part:
    (part,) = parts_of(read_view("whole", layout.shape), layout)
    return part


def replicated(m: int, n: int, replicas: int) -> Part:
    return whole(Layout((m, n), ((), ()), (axis("replicas", replicas),)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("width", [256, 1024, 4096, 32768])
@pytest.mark.parametrize("replicas", [2, 16])
def test_muon_is_shared_where_a_byte_costs_less_than_the_flops_it_saves(width, replicas, device):
    """Square d: 30 d³ flops at 5 steps (4 D d² + 2 d³ each), of which all but 1/a is saved, for an update of 4 d² bytes
    sent to a - 1 others by each 1/a of the matrices: 30 d³ (1 - 1/a) against rate · 4 d² (a - 1) / a."""
    rate = FLOPS_PER_BYTE.get(device, FLOPS_PER_BYTE_ELSEWHERE)
    demand = MuonRule().demand((width, width), torch.float32)
    expected = "split" if 30 * width >= rate * 4 else "repeat"
    assert at_replicas(demand, replicated(width, width, replicas), device) == expected


@pytest.mark.parametrize("view", ["whole", "rows:10,490,500", "columns:333*3", "transposed rows:9*111"])
def test_every_rank_chooses_alike(view):
    demand = DionRule(rank_fraction=0.25).demand((1000, 999), torch.float32)
    answers = set()
    for replica in range(3):
        for shard in range(7):
            cuts = ((axis("fsdp", 7, shard),), ())
            layout = Layout((1000, 999), cuts, (axis("replicas", 3, replica),))
            answers.add(
                tuple(at_replicas(demand, part, "cpu") for part in parts_of(read_view(view, layout.shape), layout))
            )
    assert len(answers) == 1


def test_what_is_whole_everywhere_does_not_travel():
    part = whole(Layout((64, 64), ((), ())))
    demand = DionRule().demand((64, 64), torch.float32)
    assert routes(demand, part, replicas="repeat") == []


@pytest.mark.parametrize("rank_fraction", [1 / 16, 1 / 4, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(512, 512), (2048, 512)])
def test_factors_travel_only_where_they_are_smaller(shape, rank_fraction):
    """Where (m + n) r < m n: 2 (m + n) r elements against 2 m n."""
    (m, n), rule = shape, DionRule(rank_fraction=rank_fraction)
    replicas = (axis("replicas", 4),)
    part = whole(Layout((m, n), ((), ()), replicas, replicas))
    smaller = (m + n) * rule.rank(m, n) < m * n
    assert worth_averaging(rule.demand((m, n), torch.float32), part, torch.float32) == smaller


def test_routes_name_the_axes():
    part = whole(Layout((64, 32), ((axis("fsdp", 2),), ()), (axis("replicas", 2),)))
    demand = DionRule().demand((64, 32), torch.float32)
    shared, repeated = routes(demand, part, replicas="split"), routes(demand, part, replicas="repeat")
    assert shared == [
        "all-reduce over fsdp=2",
        "reduce-scatter, work, all-gather over fsdp=2",
        "shared out over replicas=2",
    ]
    assert repeated == [*shared[:2], "repeated at replicas=2"]
