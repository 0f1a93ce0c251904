"""The choice between sharing out work over replicas and repeating it, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from orthoshard.cost import FLOPS_PER_BYTE, FLOPS_PER_BYTE_ELSEWHERE, Alike
from orthoshard.engine import dryrun
from orthoshard.engine.dryrun import Meter, dry_entries, dry_update
from orthoshard.layout import Axis, Layout
from orthoshard.parts import Part, parts_of
from orthoshard.rules import RULES
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
    rule, ways = RULES["muon"](polar_method="newton_schulz"), [("split", False), ("repeat", False)]
    # products of symmetric results by blocks, 5/8 of the flops, from 256 on: 5 (4 d³ (1/2 + 5/16) + 2 d³ 5/8) on a CPU
    flops = 22.5 if device == "cpu" else 30
    expected = "split" if flops * width >= rate * 4 else "repeat"
    matrices = Alike(rule, replicated(width, width, replicas), torch.float32, device)
    assert matrices.cheapest(ways) == (expected, False)


@pytest.mark.parametrize("view", ["whole", "rows:10,490,500", "columns:333*3", "transposed rows:9*111"])
def test_every_rank_chooses_alike(view):
    rule, ways = (
        RULES["dion"](rank_fraction=0.25),
        [(way, dealt) for way in ("split", "repeat") for dealt in (False, True)],
    )
    answers = set()
    for replica in range(3):
        for shard in range(7):
            cuts = ((axis("fsdp", 7, shard),), ())
            layout = Layout((1000, 999), cuts, (axis("replicas", 3, replica),))
            parts = parts_of(read_view(view, layout.shape), layout)
            answers.add(tuple(Alike(rule, part, torch.float32, "cpu").cheapest(ways) for part in parts))
    assert len(answers) == 1


def test_what_is_whole_everywhere_does_not_travel():
    part = whole(Layout((64, 64), ((), ())))
    assert not dry_update(RULES["dion"](), part, torch.float32, "cpu", 3).sent


@pytest.mark.parametrize("rank_fraction", [1 / 16, 1 / 4, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(512, 512), (2048, 512)])
def test_factors_travel_only_where_they_are_smaller(shape, rank_fraction):
    """Where (m + n) r < m n: 2 (m + n) r elements against 2 m n."""
    (m, n), rule = shape, RULES["dion"](rank_fraction=rank_fraction)
    replicas = (axis("replicas", 4),)
    part = whole(Layout((m, n), ((), ()), replicas, replicas))
    smaller = (m + n) * rule.direction.rank(m, n) < m * n
    assert Alike(rule, part, torch.float32, "cuda").worth_averaging() == smaller


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon", "normuon", "dion3", "row_norm"])
@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512)])
def test_the_papers_formulas_hold_for_the_dry_run(rule, shape):
    """Products of one matrix. Dion 8 m n r; DionTail 6 m n r; the orthonormalization
    of each tall factor (p, r) in one to four passes of 4 p r² and O(r³). Muon by single steps 5 (4 D d² + 2 d³), Dion3
    the same of a quarter of the rows; RowNorm none."""
    (m, n), r = shape, 128
    D, d = max(shape), min(shape)
    options = {"rank_fraction": 1 / 4} if rule in ("dion", "dion_tail") else {"polar_method": "newton_schulz"}
    made = RULES[rule](**(options if rule != "row_norm" else {}))
    dry = dry_update(made, whole(Layout(shape, ((), ()))), torch.float32, "cuda", 1)
    polar = {"muon": d, "normuon": d, "dion3": d // 4}.get(rule, 0)
    tall = {"dion": [n], "dion_tail": [m, n]}.get(rule, [])
    products = {"dion": 8.0, "dion_tail": 6.0}.get(rule, 0) * m * n * r + 5 * (4 * D * polar**2 + 2 * polar**3)
    one_pass = sum(4.0 * p * r**2 for p in tall)
    small = 60.0 * r**3 * len(tall)
    assert products + one_pass <= dry.total_flops <= products + 4 * one_pass + small


@pytest.mark.parametrize(
    ("rule", "device", "most"),
    [
        ("dion", "cpu", 4),
        ("dion", "cuda", 32 + 4),
        ("dion_tail", "cpu", 5),
        ("muon", "cuda", 4 * 64 + 1),
        ("row_norm", "cpu", 65),
    ],
)
def test_temporaries_are_those_of_the_update_alone(rule, device, most):
    """In 1/64 of a (4096, 4096): Dion at rank 64 holds a few factors, on a device also N in 16 bits; Muon N, the
    iterate, its spare and squares in 16 bits, its result; not the weights, gradients and momentum of a step."""
    made = RULES[rule](**({"rank_fraction": 1 / 64} if rule.startswith("dion") else {}))
    dry = dry_update(made, whole(Layout((4096, 4096), ((), ()))), torch.float32, device, 1)
    assert 0 < dry.peak * 64 <= most * 4 * 4096**2


@pytest.mark.parametrize(
    ("rule", "options", "most"),
    [
        ("adamw", {}, 0),
        ("adamw", {"fused": False}, 2),
        ("lion", {}, 1),
    ],
)
def test_temporaries_of_elementwise_rules_leave_out_what_they_work_on(rule, options, most):
    assert dry_entries(RULES[rule](**options), torch.float32, 1000).peak <= most * 4 * 1000


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_known_already_counts_as_if_it_were_done(rule, device, monkeypatch):
    """Operations and functions of r x r matrices that an earlier dry run has seen are not asked of torch again."""
    made, part = RULES[rule](), whole(Layout((520, 700), ((axis("fsdp", 2),), ())))

    def counted():
        dryrun._dries.clear()
        return dry_update(made, part, torch.float32, device, 3)

    first, second = counted(), counted()
    monkeypatch.setattr(Meter, "once", lambda self, f, args, options: f(*args, **options))
    dryrun._known.clear()
    each = counted()
    assert first == second
    assert replace(first, flops=()) == replace(each, flops=())
    assert first.total_flops == pytest.approx(each.total_flops)
