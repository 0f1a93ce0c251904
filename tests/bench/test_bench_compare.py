"""Two results beside each other: changes against hand-computed values, and files that do not fit."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from orthoshard.lab.bench import cli, compare
from orthoshard.lab.bench.report import Measured, to_json
from orthoshard.lab.bench.timing import Spread

HEAD = {
    "model": {"name": "tiny", "batches": [{"matrices": 2, "d_out": 96, "d_in": 32}]},
    "device": "cpu",
    "dtype": "float32",
    "spectrum": "flat",
    "matmul_precision": "highest",
    "threads": 2,
    "cpu": "one",
    "torch": "2.13",
}


def result(dion, floor, adamw, torch_muon, **changes):
    """Of times in ms; Dion, DionTail, their floor, and two yardsticks."""
    rows = [
        Measured("dion-1/4", Spread(dion), floor="floor-dion-1/4"),
        Measured("dion-tail-1/4", Spread(dion), rival="dion-1/4"),
        Measured("floor-dion-1/4", Spread(floor), flops=1000),
        Measured("adamw-fused", Spread(adamw)),
        Measured("torch-muon", Spread(torch_muon)),
    ]
    return to_json(rows, {**HEAD, **changes})


# The machine has become half as fast, and Dion needs three quarters of the time it had.
OLD = result((12.0, 10.0, 16.0), (8.0, 5.0, 9.0), (4.0, 4.0, 4.0), (40.0, 40.0, 40.0))
NEW = result((18.0, 18.0, 18.0), (16.0, 12.0, 17.0), (8.0, 8.0, 8.0), (40.0, 40.0, 40.0))


def test_the_change_is_that_of_the_ratio_to_the_reference():
    rows = {row.name: row for row in compare.rows_of(OLD, NEW)}
    dion = rows["dion-1/4"]
    assert (dion.reference, dion.old_ms, dion.new_ms) == ("floor-dion-1/4", 12, 18)
    assert (dion.old, dion.new, dion.change) == (1.5, 1.125, 0.75)
    assert dion.change_of_minima == (18 / 12) / (10 / 5)
    assert rows["dion-tail-1/4"].reference == "floor-dion-1/4", "its rival's, for it has none"
    assert (rows["torch-muon"].reference, rows["torch-muon"].change) == ("adamw-fused", 0.5)
    assert (rows["floor-dion-1/4"].reference, rows["floor-dion-1/4"].change) == (None, 2)
    assert (rows["adamw-fused"].reference, rows["adamw-fused"].change) == (None, 2)


def test_without_the_floor_a_yardstick_of_both_files_is_the_reference():
    old = {**OLD, "contestants": {name: row for name, row in OLD["contestants"].items() if "floor" not in name}}
    rows = {row.name: row for row in compare.rows_of(old, NEW)}
    assert rows["dion-1/4"].reference == "adamw-fused"
    assert rows["dion-1/4"].change == pytest.approx((18 / 8) / (12 / 4))
    assert "floor-dion-1/4" not in rows


def test_nobody_in_common():
    with pytest.raises(ValueError, match="no contestant in common"):
        compare.rows_of({**OLD, "contestants": {"x": {}}}, NEW)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "bfloat16"}, "dtype float32 against bfloat16"),
        ({"threads": 1}, "threads 2 against 1"),
        ({"device": "cuda"}, "device cpu against cuda"),
        ({"spectrum": "falling"}, "spectrum flat against falling"),
        ({"model": {"name": "other", "batches": []}}, "matrices of tiny against other"),
    ],
)
def test_files_of_other_work_do_not_fit(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        compare.check_fit(HEAD, {**HEAD, **changes}, "old.json", "new.json")
    assert "run the bench again" in str(caught.value)
    compare.check_fit(HEAD, HEAD, "old.json", "new.json")


def test_another_machine_fits_and_is_pointed_out():
    other = {**HEAD, "cpu": "two"}
    compare.check_fit(HEAD, other, "old.json", "new.json")
    assert "cpu one, then two" in (compare.differences(HEAD, other) or "")
    assert compare.differences(HEAD, HEAD) is None


def test_the_verb_compares_two_files_without_a_run(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("the bench began"))
    old, new, other = (tmp_path / name for name in ("old.json", "new.json", "other.json"))
    for path, content in ((old, OLD), (new, NEW), (other, {**NEW, "threads": 1})):
        path.write_text(json.dumps(content))
    assert cli.main(["--compare", str(old), str(new)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("dion-1/4"))
    assert line.split() == ["dion-1/4", "floor-dion-1/4", "12", "18", "1.50", "1.12", "0.75", "0.75"]
    assert cli.main(["--compare", str(old), str(other)]) == 2
    assert "threads 2 against 1" in capsys.readouterr().err


def test_a_run_is_compared_with_a_file_and_refused_before_it_where_they_do_not_fit(tmp_path, capsys, monkeypatch):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    flags = ["--model", "tiny", "--only", "dion-1/4", "floor-dion-1/4", "--rounds", "2", "--skip-peak"]
    assert cli.main([*flags, "--out", str(first)]) == 0
    assert cli.main([*flags, "--out", str(second), "--compare", str(first)]) == 0
    assert "new ratio" in capsys.readouterr().out
    before, after = (json.loads(path.read_text())["contestants"] for path in (first, second))
    (row,) = [row for row in compare.rows_of({"contestants": before}, {"contestants": after}) if row.reference]
    assert row.old == before["dion-1/4"]["ratios_of_medians"]["floor"]
    assert row.new == after["dion-1/4"]["ratios_of_medians"]["floor"]
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("the bench began"))
    assert cli.main([*flags, "--dtype", "bfloat16", "--compare", str(first)]) == 2
    assert "dtype float32 against bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "does not compare contestants"),
        ('{"contestants": {"dion-1/4": {"points": []}}}', "does not compare contestants"),
    ],
)
def test_what_is_no_result_of_the_bench(content, sentence, tmp_path, capsys):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["--model", "tiny", "--compare", str(path)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compare", "a", "b", "c"], "--compare takes"),
        (["--compare", "a", "--stages"], "--stages and --compare do not go together"),
        (["--stages", "--processes", "2"], "--processes and --stages do not go together"),
    ],
)
def test_modes_are_runs_of_their_own(arguments, sentence, capsys):
    assert cli.main(["--model", "tiny", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_table_marks_what_is_measured_against_itself():
    console = Console(width=120)
    with console.capture() as shown:
        console.print(compare.table(compare.rows_of(OLD, NEW), "old, then new"))
    lines = [line.split() for line in shown.get().splitlines()]
    assert ["floor-dion-1/4", "itself", "8", "16", "2.00", "2.40"] in lines
    assert ["torch-muon", "adamw-fused", "40", "40", "10.00", "5.00", "0.50", "0.50"] in lines
