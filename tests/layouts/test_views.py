"""Views: blocks of a parameter are treated as parameters of their own, on every layout; and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from table import EXPERT_LAYOUTS, LAYOUTS, Case, pairwise, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from view_table import CHOSEN, EXPERT_VIEWS, VIEWS, expected, view_errors

from orthoshard import Dion, Muon, RuleOptimizer
from orthoshard.layout import Axis, Layout
from orthoshard.parts import parts_of
from orthoshard.views import read_view
from simulate import simulate


@pytest.mark.parametrize("row", [*VIEWS.values(), *EXPERT_VIEWS.values()], ids=[*VIEWS, *EXPERT_VIEWS])
def test_one_process(row):
    """In float32, which the others are not."""
    assert view_errors(0, None, row, torch.float32) == []


# These cut as others do, in another number of pieces, or along more axes at a time.
ALIKE = ("ddp x3", "replicated x2", "fsdp x2", "fsdp x8", "hsdp 3x2", "replicas 2, fsdp 2, tp 2")
UNALIKE = {name: case for name, case in LAYOUTS.items() if name not in ALIKE}

PAIRS = {"one": ("dion 1/2", "normuon"), "two": ("dion columns", "dion_tail 1/4")}


def every_third():
    """Each view on every third layout, by the pairs of rules in turn."""
    for (i, view), (j, layout) in itertools.product(enumerate(VIEWS), enumerate(UNALIKE)):
        if (i + j) % 3 == 0:
            rules = [*PAIRS][(i + j) // 3 % 2]
            yield pytest.param(VIEWS[view], UNALIKE[layout], PAIRS[rules], id=f"{view}-{layout}-{rules}")


@pytest.mark.parametrize(("row", "case", "rules"), [*every_third()])
def test_views(row, case, rules):
    check(case, row, torch.float64, rules)


@pytest.mark.parametrize(("row", "case", "rules"), pairwise(EXPERT_VIEWS, EXPERT_LAYOUTS, PAIRS))
def test_expert_views(row, case, rules):
    check(case, row, torch.float64, rules)


EVERY = [(case, VIEWS) for case in LAYOUTS.values()] + [(case, EXPERT_VIEWS) for case in EXPERT_LAYOUTS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("case", "views"), EVERY, ids=[*LAYOUTS, *(f"{name}, experts" for name in EXPERT_LAYOUTS)])
def test_every_view_by_every_rule(case, views, dtype):
    for row in views.values():
        check(case, row, dtype)


def check(case, row, dtype, rules=CHOSEN):
    expected(row, dtype, rules)  # once, and not by every rank at once
    wrong = simulate(case.world, view_errors, case, row, dtype, (), rules)
    assert not any(wrong), "\n".join([row.text, *(line for lines in wrong for line in lines)])


@pytest.mark.parametrize(
    ("view", "shape", "sentence"),
    [
        ("rows:3,4", (8, 6), r"'w' of shape \(8, 6\) .*'rows:3,4': its blocks have 7 rows together, and there are 8"),
        ("rows:3*4", (8, 6), "need more than the 8 rows of the parameter"),
        ("rows:999999999999*1", (8, 6), "need more than the 8 rows"),
        ("columns:3,4", (8, 6), "need more than the 6 columns"),
        ("transposed rows:4,4", (8, 6), "need more than the 6 rows"),
        ("rows:0,8", (8, 6), "'0' is empty"),
        ("rows:4*(2,0)", (8, 6), r"'4\*\(2,0\)' is empty"),
        ("rows:4;4", (8, 6), "cannot read"),
        ("rows:4,4,", (8, 6), "cannot read"),
        ("rows:2*(2,(1,1))", (8, 6), "cannot read"),
        ("rows:", (8, 6), "cannot read"),
        ("rows", (8, 6), "'rows' is unknown"),
        ("heads:4", (8, 6), "'heads:4' is unknown; the views are 'whole', 'stack', 'transposed'"),
        ("", (8, 6), "'' is unknown"),
        ("rows:4,4 columns:3,3", (8, 6), "blocks twice"),
        ("rows:4,4 transposed", (8, 6), "comes before the blocks"),
        ("conv", (8, 6), "3 dimensions or more"),
        ("transposed conv", (8, 6, 3), "'conv' comes first"),
        ("whole", (8, 6, 3, 3), "no matrix.*view='conv'"),
        ("whole", (4, 2, 8, 6), "A stack of matrices, such as experts, needs view='stack'"),
        ("transposed rows:4,4", (4, 2, 6, 8), "needs view='stack'"),
        ("stack", (8, 6), "3 dimensions or more"),
        ("transposed stack", (4, 2, 8, 6), "'stack' comes first"),
        ("stack rows:3,4", (4, 2, 8, 6), "its blocks have 7 rows together"),
        ("whole", (8,), "no matrix"),
        ("conv", (8,), "no matrix"),
    ],
)
def test_views_that_do_not_fit_are_refused_at_construction(view, shape, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Dion([{"params": [("w", nn.Parameter(torch.ones(shape)))], "view": view}])
    assert "'w'" in str(caught.value)


def test_a_kernel_cut_along_its_window_is_refused():
    def cut_inside(rank):
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(place(torch.ones(4, 3, 6), mesh, Case((2,), (Shard(2),), ((0, 2),))))
        with pytest.raises(ValueError, match=r"'w' is cut along dimension 2.*shard it along dimension 1"):
            Muon([{"params": [("w", p)], "view": "conv"}])

    simulate(2, cut_inside)


def test_elementwise_rules_have_no_use_for_a_view():
    p = nn.Parameter(torch.ones(4, 3, 2, 2))
    optimizer = RuleOptimizer([{"params": [p], "rule": "adamw", "view": "rows:1,1"}])
    p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    ("view", "shape", "permuted"),
    [
        ("conv", (6, 4, 3, 3), (0, 2, 3, 1)),
        ("stack", (3, 2, 5, 4), (1, 0, 2, 3)),
        ("stack rows:3,2", (2, 3, 5, 4), (0, 3, 1, 2)),
    ],
)
def test_parameters_of_any_strides_are_written_in_place(view, shape, permuted):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    back = [permuted.index(i) for i in range(4)]
    results = []
    for stored in (
        lambda t: t.clone(),
        lambda t: t.permute(permuted).clone(memory_format=torch.contiguous_format).permute(back),
    ):
        p = nn.Parameter(stored(whole))
        optimizer = Dion([{"params": [("w", p)], "view": view}])
        address, strides = p.data_ptr(), p.stride()
        for step in range(3):
            p.grad = stored(whole.sin().mul(step + 1))
            optimizer.step()
        assert (p.data_ptr(), p.stride()) == (address, strides)
        assert not torch.equal(p, whole)
        results.append(p.detach())
    assert results[0].stride() != results[1].stride()
    assert torch.allclose(*results, rtol=0, atol=1e-6)


def test_a_stack_of_one_dimension_is_what_it_is_without_the_word():
    weights = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for view in ("whole", "stack"):
        p = nn.Parameter(weights.clone())
        p.grad = weights.sin()
        Dion([{"params": [("w", p)], "view": view}]).step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_a_view_that_changes_between_steps_is_noticed():
    p = nn.Parameter(torch.ones(8, 6))
    optimizer = Muon([("w", p)])
    p.grad = torch.ones(8, 6)
    optimizer.step()
    optimizer.param_groups[0]["view"] = "rows:4,4"
    assert [update.part.matrix for update in optimizer.plan().buckets[0].updates] == [(4, 6)]


def test_state_of_other_views_is_refused():
    saved = Muon([nn.Parameter(torch.ones(8, 6))])
    saved.initialize_state()
    other = Muon([{"params": [nn.Parameter(torch.ones(8, 6))], "view": "rows:4,4"}])
    with pytest.raises(ValueError, match="saved with view='whole', and has 'rows:4,4' here"):
        other.load_state_dict(saved.state_dict())


def test_explain_names_the_view_and_every_size():
    p = nn.Parameter(torch.ones(12, 6))
    text = Dion([{"params": [("w", p)], "view": "rows:8,2,2"}], rank_fraction=0.5).explain()
    assert "12×6 as rows:8,2,2" in text
    assert "1 8×6 under dion" in text
    assert "2 2×6 in 2 updates under dion" in text


def axes(*sizes):
    return tuple(Axis((i,), "abc"[i], size, 0) for i, size in enumerate(sizes))


@pytest.mark.parametrize(
    ("view", "shape", "cuts", "sizes"),
    [
        ("rows:8*4", (32, 5), (axes(4), ()), [(4, 5)]),
        ("rows:8*4", (32, 5), (axes(2, 4), ()), [(4, 5)]),
        ("rows:6*4", (24, 5), (axes(3), ()), [(4, 5)]),
        ("rows:3*2", (6, 5), (axes(4), ()), [(2, 5)]),
        ("rows:6*4", (24, 5), (axes(4), ()), [(4, 5)] * 6),
        ("rows:16,16", (32, 5), (axes(4), ()), [(16, 5)] * 2),
        ("rows:2*4,8*1", (16, 5), (axes(2), ()), [(4, 5)] * 2 + [(1, 5)] * 8),
        ("rows:4*(4,4)", (32, 5), (axes(4), ()), [(16, 5)] * 2),
        ("transposed columns:8*4", (32, 5), (axes(4), ()), [(5, 4)]),
        ("columns:8*4", (5, 32), ((), axes(4)), [(5, 4)] * 8),
    ],
)
def test_blocks_that_no_cut_goes_through_are_a_batch(view, shape, cuts, sizes):
    """Then nothing travels within a matrix. Otherwise each block is a part of its own, on every rank."""
    parts = parts_of(read_view(view, shape), Layout(shape, cuts))
    assert [part.matrix for part in parts] == sizes
    assert (len(parts) == 1) == (not parts[0].over("both"))
