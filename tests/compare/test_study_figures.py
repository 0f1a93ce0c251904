"""Figures whose numbers are computed: bytes against formulas, parabolas, means over matrices, and bad options."""

import json
import math
from pathlib import Path

import pytest
from compare_fakes import FakeStart, write_result

from orthoshard.lab.canvas import styles, svg
from orthoshard.lab.compare import cli as compare
from orthoshard.lab.compare import comparison
from orthoshard.lab.compare.study import wire
from orthoshard.lab.compare.study.figures import KINDS, rates
from orthoshard.lab.compare.study.results import gather
from orthoshard.lab.compare.study.wire import formula
from orthoshard.lab.train.errors import UserError

RULES = (("adamw", "adamw", 0.0), ("muon", "muon", 0.0), ("dion-1", "dion", 1.0), ("dion-1/8", "dion", 1 / 8))


@pytest.mark.parametrize(("m", "n"), [(128, 256), (256, 128)])
def test_the_formulas_are_what_is_counted(m, n):
    """Above the formula: largest entries, column norms (a number for each column of n entries) and the agreement."""
    lines = wire.count(wire.Setting(m, n, 4, RULES))
    assert [(line.label, line.layout) for line in lines] == [
        (label, layout) for label, _, _ in RULES for layout in ("state", "replicas", "rows", "columns")
    ]
    for line in lines:
        assert line.formula <= line.counted <= 1.01 * line.formula + 100, (line.label, line.layout)


def test_the_formulas_of_the_paper():
    """Dion's factors over replicas are smaller than gradients while (m + n) r < m n; its state is Muon's and Q."""
    m, n, ranks = 4096, 1024, 8
    for r in (64, 512, 819, 820, 1024):
        smaller = formula("dion", "replicas", m, n, r, ranks) < formula("muon", "replicas", m, n, 0, ranks)
        assert smaller == ((m + n) * r < m * n)
    assert formula("dion", "state", m, n, 64, ranks) - formula("muon", "state", m, n, 0, ranks) == 4 * m * 64
    assert formula("adamw", "state", m, n, 0, ranks) == 8 * m * n


def test_the_vertex_of_a_parabola_in_log2():
    tried = {lr: 3 + 0.1 * math.log2(lr / 0.013) ** 2 for lr in (0.005, 0.01, 0.02, 0.04)}
    assert rates.vertex(tried) == pytest.approx(0.013)
    assert rates.vertex(tried | {0.08: None}) == pytest.approx(0.013)
    assert rates.vertex({0.01: 3.0, 0.02: 3.1, 0.04: 3.2}) is None, "the best lies on the edge"
    assert rates.vertex({0.01: 3.0, 0.02: 3.0, 0.04: 3.0}) is None
    assert rates.vertex({0.01: 3.0, 0.02: 2.9}) is None


def test_how_far_a_rate_may_be_off():
    assert rates.within({0.01: 3.04, 0.02: 3.0, 0.04: 3.08}, near=0.02) == pytest.approx(0.5 + 0.25)
    assert rates.within({0.01: 3.01, 0.02: 3.0, 0.04: 3.08}, near=0.02) is None, "further down was not tried"
    assert rates.within({0.01: 3.04, 0.02: 3.0, 0.04: None}, near=0.02) == pytest.approx(0.5 + 1)
    assert rates.within({0.01: None}) is None


@pytest.fixture
def results(tmp_path):
    """A comparison whose runs were watched: captured 0.5 and 0.7 at step 5, 0.6 at step 10 (one matrix was zero)."""

    def figures(captured, rank=16.0):
        given = {"group": 0, "matrices": 1, "rank": rank, "effective_rank": 32.0, "orthogonality": 1e-6}
        return given | {"captured": captured, "basis": None, "live": rank, "update_rms": 1.0, "spectrum": None}

    def finish(folder: Path):
        write_result(folder)
        steps = [{"a": figures(0.5), "b": figures(0.7)}, {"a": figures(0.6), "b": figures(None)}]
        group = {"rule": "dion", "role": "matrix", "view": None, "rank_fraction": 0.25}
        events = [
            {"kind": "diagnostics", "step": 5 * k, "groups": [group], "parameters": each}
            for k, each in enumerate(steps, 1)
        ]
        (folder / "run.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    flags = ["--model", "nano", "--only", "dion-1/4", "--points", "1", "--out", str(tmp_path)]
    assert compare.main(flags, start=FakeStart(polls=0, finish=finish)) == 0
    return gather("watched", comparison.read(tmp_path))


def test_figures_of_updates_are_means_and_ranges_over_matrices(results):
    drawn = KINDS["updates"].draw([results], {})
    (curve,) = drawn.data["curves"]
    assert curve["steps"] == [5, 10]
    assert curve["captured"] == [[pytest.approx(0.6), 0.5, 0.7], [0.6, 0.6, 0.6]]
    assert curve["effective_rank"][0] == [0.5, 0.5, 0.5], "32 of a smaller side of 16 / (1/4)"
    assert curve["basis"] == [None, None]
    assert "| dion-1/4 | step 5 | 0.600 | 0.500 | 1e-06 |  |" in drawn.table


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("final-loss", {"x": "depth"}, "x = 'depth'; give one of parameters, width, batch, comparison"),
        ("rates", {"panels": "seeds"}, "panels = 'seeds'"),
        ("wire", {"matrix": [512]}, "give two sides"),
        ("wire", {"ranks": 3}, "that divide both sides"),
    ],
)
def test_bad_options_of_a_figure(results, kind, options, sentence):
    with pytest.raises(UserError, match=sentence):
        KINDS[kind].draw([results], options)


def test_where_comparisons_stand_on_an_axis(results):
    assert KINDS["final-loss"].draw([results], {"x": "batch"}).data["curves"][0]["points"][0]["place"] == 16 * 128
    assert KINDS["final-loss"].draw([results], {"x": "width"}).data["curves"][0]["points"][0]["place"] == 64


def test_styles_differ_and_drawings_are_repeatable():
    looks = styles([f"rival {k}" for k in range(25)])
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == 25

    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4], label="loss <a & b>")
        figure.axes[0].legend()

    assert svg(draw, 3, 2) == svg(draw, 3, 2)
    assert "loss &lt;a &amp; b&gt;" in svg(draw, 3, 2)
