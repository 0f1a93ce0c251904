"""The verb from its flags to its files, with runs that take no time; and every error a user can make."""

import json
import os
from pathlib import Path

import pytest
from compare_fakes import FakeStart, write_result

from orthoshard.lab.compare import cli, comparison, settings
from orthoshard.lab.compare.display import Clock, words
from orthoshard.lab.compare.pool import Active, Start
from orthoshard.lab.train.presets import load_preset

TINY = ["--model", "nano", "--vocabulary", "300", "--context", "16", "--steps", "4", "--batch", "2"]
TINY += ["--only", "adamw", "muon"]


def compare(out: Path, *more: str, start: Start | None = None) -> tuple[int, FakeStart]:
    fake = FakeStart(polls=0)
    return cli.main([*TINY, "--out", str(out), *more], start=start or fake), fake


def test_a_comparison_leaves_table_plot_and_json(tmp_path: Path, capsys, real_picture):
    code, start = compare(tmp_path / "new" / "c")
    assert code == 0
    assert len(start.runs) == 3 + 2 + 3 + 3, "muon's second grid grows by one"
    out = tmp_path / "new" / "c"
    result = json.loads((out / "results.json").read_text())
    assert [row["label"] for row in result["rows"]] == ["adamw", "muon"]
    assert result["rows"][1]["over_reference"] == pytest.approx(-0.5)
    assert result["rows"][0]["tried"] == [[0.0015, 4.3], [0.003, 4.25], [0.006, 4.3]]
    assert result["rows"][0]["scalar_tried"] == [[0.006, 4.3], [0.012, 4.25], [0.024, 4.3]]
    assert len(result["runs"]) == 11
    assert result["report"]["torch"]
    assert result["base"]["schedule"]["steps"] == 4
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert "| muon | 0.02 | 0.024 | 3.750 | -0.500 |" in table
    assert "| adamw | 0.003 | 0.012 | 4.250 |" in table, "adamw has two rates as the others do"
    assert "nano on shakespeare, 4 steps of 32 tokens, one seed" in table
    shown = capsys.readouterr().out
    assert "3.750" in shown
    assert "of at least 10 runs" in shown
    assert "11 of at least 11 runs, 0 s left" in shown


def test_the_same_command_goes_on_and_more_rivals_and_seeds_continue_it(tmp_path: Path):
    compare(tmp_path)
    assert compare(tmp_path)[1].runs == []
    assert len(compare(tmp_path, "--seeds", "0", "1")[1].runs) == 2
    assert len(compare(tmp_path, "--only", "adamw", "dion-1/16")[1].runs) == 5 + 2
    assert len(compare(tmp_path, "--checkpoint-every", "7", "--threads", "1")[1].runs) == 0


def test_report_only_draws_the_same_again_and_runs_nothing(tmp_path: Path):
    compare(tmp_path)
    table = (tmp_path / "table.md").read_text()
    for name in ("table.md", "compare.png", "results.json"):
        (tmp_path / name).unlink()
    fake = FakeStart()
    assert cli.main(["--out", str(tmp_path), "--report-only"], start=fake) == 0
    assert fake.runs == []
    assert (tmp_path / "table.md").read_text() == table
    assert (tmp_path / "compare.png").exists()


def test_report_only_of_a_comparison_that_is_half_done(tmp_path: Path, capsys):
    codes = {"muon": -9, "adamw-lr0.006": -9}
    assert compare(tmp_path, start=FakeStart(codes=codes, polls=0))[0] == 1
    assert "the same command tries it again" in capsys.readouterr().err
    assert cli.main(["--out", str(tmp_path), "--report-only"]) == 0
    assert "| adamw |  |  | running |" in (tmp_path / "table.md").read_text()


def test_a_rival_that_always_diverges_is_a_row_and_stops_nobody(tmp_path: Path, real_picture):
    rivals = tmp_path / "rivals.toml"
    rivals.write_text(
        '[[rival]]\nlabel = "adamw"\nname = "adamw"\n[[rival]]\nlabel = "wild"\nname = "muon"\nlr = 1e9\n'
    )
    arguments = [*TINY[:-3], "--optimizers", str(rivals), "--out", str(tmp_path / "c"), "--most", "5"]
    assert cli.main(arguments, start=FakeStart(polls=0)) == 0
    table = (tmp_path / "c" / "table.md").read_text()
    assert "| wild |  |  | diverged |" in table
    assert "| adamw | 0.003 | 0.012 | 4.250 |" in table
    assert (tmp_path / "c" / "compare.png").exists()


def test_other_settings_are_refused_and_change_nothing(tmp_path: Path, capsys):
    compare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, name in ((["--steps", "5"], "schedule.steps = 4"), (["--validate-every", "3"], "record.validate_every")):
        code, start = compare(tmp_path, *flags)
        assert code == 2
        assert start.runs == []
        assert name in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_data_is_refused(tmp_path: Path, capsys, monkeypatch):
    compare(tmp_path)
    monkeypatch.setattr(settings, "try_out", lambda base, optimizers: "other")
    assert compare(tmp_path)[0] == 2
    assert "other data" in capsys.readouterr().err


def test_scalar_lr_is_tuned_for_all_or_the_same_for_all(tmp_path: Path):
    code, start = compare(tmp_path, "--scalar-lr", "0.006", "--scalar-points", "1", "--points", "1")
    assert (code, len(start.runs)) == (0, 2)
    table = (tmp_path / "table.md").read_text()
    assert "| adamw | 0.003 | 0.006 |" in table
    assert "| muon | 0.02 | 0.006 |" in table
    assert len(compare(tmp_path, "--scalar-lr", "0.006", "--points", "1")[1].runs) == 3 + 4
    table = (tmp_path / "table.md").read_text()
    assert "| adamw | 0.003 | 0.012 |" in table
    assert "| muon | 0.02 | 0.024 |" in table


def test_a_comparison_of_before_there_were_two_rates_is_shown(tmp_path: Path):
    """Its settings have no second grid, and adamw no scalar_lr."""
    compare(tmp_path, "--scalar-points", "1")
    settings = json.loads((tmp_path / "compare.json").read_text())
    del settings["sweep"]["scalar_points"]
    (tmp_path / "compare.json").write_text(json.dumps(settings))
    for path in tmp_path.rglob("result.json"):
        values = json.loads(path.read_text())
        del values["scalar_lr"], values["j"]
        path.write_text(json.dumps(values))
    assert cli.main(["--out", str(tmp_path), "--report-only"]) == 0
    assert "| muon | 0.02 |  | 3.800 |" in (tmp_path / "table.md").read_text()


def test_runs_at_once_share_the_cores(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    compare(tmp_path, "--jobs", "3")
    assert comparison.read(tmp_path).base.machine.threads == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "adamm"], "did you mean 'adamw'"),
        (["--reference", "dion"], "no optimizer for --reference 'dion'"),
        (["--points", "0"], "--points is 0"),
        (["--most", "2"], "at least as many as --points"),
        (["--scalar-points", "0"], "--scalar-points is 0"),
        (["--scalar-points", "8"], "and --scalar-points, 8"),
        (["--seeds"], "at least one seed"),
        (["--seeds", "1", "1"], "none twice"),
        (["--seeds", "-1"], "--seed is -1"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--validation-batches", "0"], "--validation-batches is 0"),
        (["--scalar-lr", "nan"], "has scalar_lr = nan"),
        (["--preset", "quik"], "did you mean 'quick'"),
        (["--optimizers", "nothing.toml"], "cannot be read"),
        (["--report-only"], "there is no comparison in"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(tmp_path: Path, flags, sentence, capsys):
    out = tmp_path / "c"
    code, start = compare(out, *flags)
    assert code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert start.runs == []
    assert not out.exists()


def test_a_rate_that_is_no_rate(tmp_path: Path, capsys):
    (tmp_path / "r.toml").write_text("[[rival]]\nlabel = 'x'\nname = 'adamw'\nlr = -1.0\n")
    code = cli.main(["--optimizers", str(tmp_path / "r.toml"), "--out", str(tmp_path / "c")])
    assert code == 2
    assert "give a number above 0" in capsys.readouterr().err


def test_an_unwritable_folder(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("kept")
    code, start = compare(tmp_path / "file" / "c")
    assert code == 2
    assert start.runs == []
    assert "nothing can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("left", [(), ("base", "digest")])
def test_what_is_no_comparison_is_not_overwritten(tmp_path: Path, left, capsys):
    """Damaged settings, or those of a search on the same model and data."""
    compare(tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    text = json.dumps({key: found[key] for key in left})
    (tmp_path / "compare.json").write_text(text)
    assert compare(tmp_path)[0] == 2
    assert "is not a comparison's settings" in capsys.readouterr().err
    assert (tmp_path / "compare.json").read_text() == text


def test_ctrl_c_stops_the_workers_and_says_how_to_go_on(tmp_path: Path, capsys):
    def interrupt(folder):
        if len(start.runs) == 3:
            raise KeyboardInterrupt
        write_result(folder)

    start = FakeStart(polls=0, finish=interrupt)
    assert compare(tmp_path, start=start)[0] == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert start.workers[-1].terminated
    assert len(compare(tmp_path)[1].runs) == 9


def test_optimizers_and_data_are_tried_before_the_first_run(tmp_path: Path, capsys, real_check):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    (tmp_path / "r.toml").write_text("[[rival]]\nlabel = 'x'\nname = 'dion'\nrank_fraction = 2.0\n")
    arguments = [
        "--corpus",
        f"text:{text}",
        "--cache",
        str(tmp_path / "cache"),
        *TINY[:-3],
        "--out",
        str(tmp_path / "c"),
    ]
    start = FakeStart()
    assert cli.main([*arguments, "--optimizers", str(tmp_path / "r.toml")], start=start) == 2
    assert "the optimizer x: " in capsys.readouterr().err
    assert cli.main([*arguments, "--corpus", f"text:{tmp_path / 'nothing.txt'}"], start=start) == 2
    assert "nothing.txt" in capsys.readouterr().err
    assert cli.main([*arguments, "--device", "cuda:99"], start=start) == 2
    assert "cuda:99" in capsys.readouterr().err
    assert start.runs == []
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0 s"), (89.4, "89 s"), (91, "2 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_words(seconds, text):
    assert words(seconds) == text


def test_the_time_left(tmp_path: Path):
    from orthoshard.lab.compare import job as jobs
    from orthoshard.lab.compare.grid import Spot
    from orthoshard.lab.compare.rivals import DEFAULT
    from orthoshard.lab.train.config import TrainConfig

    job = jobs.make(DEFAULT[0], Spot(0, 0, 0), TrainConfig())
    half = Active(job, tmp_path, FakeStart()(tmp_path, ()))
    (tmp_path / "run.jsonl").write_text('{"kind": "step", "step": 150}\n')
    assert Clock(1).left(5, []) is None
    assert Clock(1, [100.0, 140.0]).left(5, [half]) == 4.5 * 120
    assert Clock(2, [100.0, 140.0]).left(5, [half]) == 4.5 * 60
    assert Clock(4, [120.0]).left(1, [half]) == 60


def test_no_flag_at_all_is_the_default_comparison():
    assert cli.parse([]).model == load_preset("default").model
    assert cli.parse(["--preset=quick"]).model == load_preset("quick").model
