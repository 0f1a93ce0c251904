"""Growth: predictions against hand-computed values, the line, the points, and the verb on the tiny model."""

import json
from pathlib import Path

import pytest
import torch

from orthoshard.budget import Cost
from orthoshard.lab.bench import cli, growth, predicted
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.models import find_model
from orthoshard.lab.bench.predicted import Point, fit_line, results
from orthoshard.lab.bench.timing import Spread


def point(name: str, value: float, milliseconds: float, flops: float, memory: float) -> Point:
    return Point(
        name, value, int(value), Spread((milliseconds, milliseconds + 2, milliseconds - 2)), Cost(flops, memory)
    )


# 1 ms a 100 bytes. The anchor takes 5 ms for its bytes, so 15 for its 3000 flops: 200 flops a ms.
POINTS = [point("1", 1, 7, 1000, 100), point("2", 2, 20, 3000, 500), point("4", 4, 60, 8000, 1000)]


def test_rates_come_from_the_anchor_and_predict_the_others():
    found = results(POINTS, "2", bytes_per_ms=100, calls_ms=0)
    assert found["gflops_per_second"] == pytest.approx(200 / 1e6)
    assert found["gigabytes_per_second"] == pytest.approx(100 / 1e6)
    assert [row["predicted_ms"] for row in found["points"]] == pytest.approx([1 + 5, 5 + 15, 10 + 40])
    assert [row["measured_over_predicted"] for row in found["points"]] == pytest.approx([7 / 6, 1, 60 / 50])
    assert found["worst_prediction"] == pytest.approx(0.2)


def test_an_anchor_faster_than_its_bytes_is_all_bytes():
    found = results(POINTS, "2", bytes_per_ms=10, calls_ms=0)
    assert found["gflops_per_second"] is None
    assert [row["predicted_ms"] for row in found["points"]] == pytest.approx([4, 20, 40])


def test_calls_cost_the_same_for_every_matrix():
    """1.5 ms each: 3 of the anchor's 20 ms, 5 for its bytes, 12 for its 3000 flops."""
    found = results(POINTS, "2", bytes_per_ms=100, calls_ms=1.5)
    assert [row["calls_ms"] for row in found["points"]] == [1.5, 3, 6]
    assert [row["predicted_ms"] for row in found["points"]] == pytest.approx([1.5 + 1 + 4, 3 + 5 + 12, 6 + 10 + 32])
    assert found["worst_prediction"] == pytest.approx(60 / 48 - 1)
    assert found["worst_prediction_without_calls"] == pytest.approx(0.2)


def test_an_anchor_of_nothing_but_calls():
    found = results(POINTS, "2", bytes_per_ms=100, calls_ms=100)
    assert (found["gflops_per_second"], found["gigabytes_per_second"]) == (None, None)
    assert [row["predicted_ms"] for row in found["points"]] == pytest.approx([10, 20, 40])


def test_the_line_goes_through_what_lies_on_one():
    assert fit_line([1, 2, 4, 48], [5, 8, 14, 146]) == pytest.approx((2, 3))


def test_the_line_minimizes_relative_deviations():
    x, t = [1.0, 2.0, 10.0], [10.0, 24.0, 90.0]
    a, b = fit_line(x, t)

    def cost(a, b):
        return sum(((a + b * u) / v - 1) ** 2 for u, v in zip(x, t, strict=True))

    assert all(cost(a, b) < cost(a + da, b + db) for da, db in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)))


@pytest.mark.parametrize(
    ("along", "given", "points"),
    [("layers", ("8", "2", "2", "1"), ("1", "2", "8")), ("rank", ("0.25", "1/16", "1"), ("1/16", "1/4", "1"))],
)
def test_points_are_sorted_and_unique(along, given, points):
    assert growth.check_points(along, given) == points


def asked(**flags) -> growth.Growth:
    return growth.growth_of(BenchConfig(device="cpu", **flags), find_model("tiny"), ("1/8",))


def test_what_grows():
    layers = asked(growth="layers", points=("1", "5"), only=("dion-1/8",))
    assert (layers.rule, layers.rank) == ("dion", "1/8")
    assert len(layers.shapes_at("5").matrices) == 20
    width = asked(growth="width", points=("16", "32"), only=("dion-tail-1/4",))
    assert (width.rule, width.rank) == ("dion-tail", "1/4")
    assert width.shapes_at("16").layer == ((48, 16), (16, 16), (32, 16), (16, 32))
    assert width.shapes_at("16").layers == 2
    rank = asked(growth="rank", only=("dion-tail",))
    assert [rank.fraction_at(each) for each in ("1/16", "1")] == [1 / 16, 1]
    assert asked(growth="width", only=("muon",)).fraction_at("256") == 0


def test_flops_and_bytes_grow_as_the_formula_says():
    """Dion at rank r: 8 m n r flops and at most two passes of 4 n r² + 2/3 r³; at least 8 accesses of 4 bytes an
    entry."""
    made = asked(growth="layers", points=("1", "3"), rounds=1, seconds=1)
    found = growth.measure_growth(made)
    for row, layers in zip(found["points"], (1, 3), strict=True):
        products = orthonormal = entries = 0.0
        for m, n in ((96, 32), (32, 32), (64, 32), (32, 64)):
            r = min(m, n) // 4
            products += layers * 8 * m * n * r
            orthonormal += layers * 2 * (4 * n * r**2 + 2 / 3 * r**3)
            entries += layers * m * n
        assert products + orthonormal / 3 < row["flops"] <= products + orthonormal
        assert row["bytes"] > 8 * 4 * entries
    one, three = found["points"]
    assert three["flops"] == pytest.approx(3 * one["flops"])
    assert found["anchor"] == "3"
    assert found["points"][1]["measured_over_predicted"] == pytest.approx(1)


@pytest.mark.parametrize(("along", "rule"), [("layers", "muon"), ("width", "dion-1/4"), ("rank", "dion-tail")])
def test_the_verb_writes_a_file_and_a_picture(along, rule, tmp_path: Path, capsys):
    out = tmp_path / "growth.json"
    points = {"layers": ["1", "2"], "width": ["16", "32"], "rank": ["1/8", "1/4"]}[along]
    arguments = ["--model", "tiny", "--growth", along, "--points", *points, "--only", rule, "--rounds", "2"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["point"] for row in found["points"]] == points
    assert all(len(row["times_ms"]) == 2 for row in found["points"])
    assert found["rank"] == {"layers": None, "width": "1/4", "rank": None}[along]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "The worst prediction is off by" in shown
    assert ("from the line" in shown) == (along == "layers")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--growth", "layers", "--points", "1", "x"], "'x' is no number of layers or width"),
        (["--growth", "layers", "--points", "0", "1"], "'0' is no number"),
        (["--growth", "width", "--points", "64"], "give 2 or more"),
        (["--growth", "rank", "--points", "1", "2"], "lies in (0, 1]"),
        (["--growth", "rank", "--only", "muon"], "has no rank to grow"),
        (["--growth", "width", "--only", "muon", "dion-1/4"], "--only names 2"),
        (["--growth", "width", "--only", "adamw-fused"], "matches no contestant"),
        (["--growth", "layers", "--rounds", "0"], "at least 1"),
        (["--growth", "layers", "--points", "1", "1000000000"], "give smaller --points"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(growth, "measure_growth", lambda *_: pytest.fail("the bench began"))
    assert cli.main(["--model", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_widths_scale_every_side():
    llama = find_model("llama-60m")
    assert llama.width == 512
    assert llama.of_width(256).layer[-1] == (256, 688)
    assert find_model("smollm2-135m").of_width(576).layer == find_model("smollm2-135m").layer


def test_memory_counts_weights_state_and_gradients():
    made = asked(growth="layers", points=("1", "2"), only=("muon",))
    one = find_model("tiny").elements // 2
    # the gradients of two layers; weights and momentum of one and of two; twice the largest for a step
    assert growth.memory_needed(made) == 4 * (2 * one + 2 * (one + 2 * one) + 2 * 2 * one)
    assert torch.float32.itemsize == 4
    assert predicted.worst([{"x": 0.9}, {"x": 1.2}], "x") == pytest.approx(0.2)
