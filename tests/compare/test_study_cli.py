"""The verb from a study to its figures, with runs that take no time; stopping, going on, and damaged files."""

import json
import shutil
from pathlib import Path

import pytest
from compare_fakes import FakeStart, write_result

from orthoshard.lab.compare import cli as compare
from orthoshard.lab.compare import comparison
from orthoshard.lab.compare.study import cli
from orthoshard.lab.compare.study.work import Ledger, StudyClock
from orthoshard.lab.train import record

STUDY = """
[[comparison]]
name = "width-64"
flags = ["--model", "nano", "--steps", "4", "--only", "adamw", "muon", "--seeds", "0", "1"]
minutes = 1
[[comparison]]
name = "width-128"
flags = ["--model", "tiny", "--steps", "4", "--only", "adamw", "muon"]
minutes = 4
[[figure]]
name = "fig1"
kind = "reach"
title = "Steps to AdamW"
[[figure]]
name = "fig2"
kind = "final-loss"
x = "parameters"
[[figure]]
name = "transfer"
kind = "rates"
comparisons = ["width-*"]
panels = "rivals"
[[figure]]
name = "curves"
kind = "curves"
[[figure]]
name = "table"
kind = "table"
reference = "adamw"
"""
PARAMETERS = {"nano": 172_352, "tiny": 1_070_000}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A study that has been run and drawn; not to be changed."""
    path = tmp_path_factory.mktemp("complete")
    assert reproduce(path)[0] == 0
    return path


@pytest.fixture
def done(complete, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(complete, tmp_path / "copy")


def finish(folder: Path) -> None:
    """What a worker leaves behind, its record too."""
    write_result(folder)
    model = json.loads((folder / "job.json").read_text())["config"]["model"]["name"]
    (folder / record.NAME).write_text(json.dumps({"kind": "run", "step": 0, "parameters": PARAMETERS[model]}) + "\n")


def reproduce(tmp_path: Path, *more: str, start: FakeStart | None = None) -> tuple[int, FakeStart]:
    (tmp_path / "study.toml").write_text(STUDY)
    fake = start or FakeStart(polls=0, finish=finish)
    return cli.main([str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), *more], start=fake), fake


def figure(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "out" / "figures" / f"{name}.json").read_text())


def test_a_study_leaves_comparisons_and_figures(tmp_path, capsys):
    code, start = reproduce(tmp_path)
    assert code == 0
    assert len(start.runs) == 2 * (5 + 6) + 2  # adamw, muon, whose second grid grows by one; and a seed more each
    folder = tmp_path / "out" / "figures"
    assert {path.name for path in folder.glob("*.svg")} == {
        f"{n}.svg" for n in ("fig1", "fig2", "transfer", "curves", "table")
    }
    assert all(path.read_text().startswith("<?xml") for path in folder.glob("*.svg"))
    shown = capsys.readouterr().out
    assert "width-128: 10 of at least 10 runs left" in shown
    assert "Steps to AdamW" in shown
    assert len(comparison.read(tmp_path / "out" / "width-64").rivals) == 2
    about = figure(tmp_path, "fig1")
    assert (about["unfinished"], about["missing"]) == ([], [])
    assert about["report"]["command"]
    assert about["comparisons"]["width-64"]["base"]["model"]["name"] == "nano"


def test_figures_say_what_the_runs_were(complete):
    """The fake runs' losses are 5.25, 4.25 (adamw) and 4.75, 3.75 (muon) at steps 2 and 4, 0.01 more on seed 1."""
    adamw, muon = figure(complete, "fig1")["data"]["comparisons"][0]["rivals"]
    assert (adamw["steps"], adamw["share_of_reference_run"]) == (4, 1)
    assert muon["steps"] == pytest.approx(3)  # halfway from 4.75 at step 2 to 3.75 at step 4
    assert muon["seconds"] == pytest.approx(4)  # elapsed: 0, 2, 3, 4, 5
    assert muon["quiet_seconds"] == pytest.approx(3 * 0.1)  # a step takes 100 ms, 10 of them the optimizer
    assert (muon["seeds"], muon["reached"], muon["lr"]) == (2, 2, 0.02)
    curves = {curve["label"]: curve["points"] for curve in figure(complete, "fig2")["data"]["curves"]}
    assert [(p["place"], p["loss"], p["spread"]) for p in curves["muon"]] == [
        (172_352, pytest.approx(3.755), pytest.approx(0.005)),
        (1_070_000, 3.75, None),
    ]
    transfer = {(c["comparison"], c["label"]): c for c in figure(complete, "transfer")["data"]["curves"]}
    assert transfer["width-64", "muon"]["lr"] == [0.01, 0.02, 0.04]
    assert transfer["width-64", "muon"]["vertex"] == pytest.approx(0.02)  # a parabola around it
    assert transfer["width-64", "muon"]["within"] == pytest.approx(0.8)  # neighbours are 0.05 above
    row = figure(complete, "table")["data"]["comparisons"][0]["rows"][1]
    assert row["less_reference"] == pytest.approx(-0.5)
    assert row["stands_out"] is True
    table = (complete / "out" / "figures" / "table.md").read_text()
    assert "| muon | 0.02 | 0.024 | 3.755 ± 0.005 | -0.500 | yes | 2 | 6 |" in table


def test_the_same_command_goes_on_and_then_draws_the_same_bytes(done):
    folder = done / "out" / "figures"
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.svg")}
    for path in folder.iterdir():
        path.unlink()
    code, start = reproduce(done)
    assert (code, start.runs) == (0, [])
    assert {path.name: path.read_bytes() for path in folder.glob("*.svg")} == drawn
    code, start = reproduce(done, "--report-only", "--figures", str(done / "elsewhere"))
    assert (code, start.runs) == (0, [])
    assert (done / "elsewhere" / "fig2.svg").read_bytes() == drawn["fig2.svg"]


def test_ctrl_c_in_the_second_comparison_and_the_same_command_goes_on(tmp_path, capsys):
    def interrupt(folder):
        if len(start.runs) == 16:
            raise KeyboardInterrupt
        finish(folder)

    start = FakeStart(polls=0, finish=interrupt)
    assert reproduce(tmp_path, start=start)[0] == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert start.workers[-1].terminated
    assert not list((tmp_path / "out" / "figures").glob("*"))
    code, again = reproduce(tmp_path)
    assert (code, len(again.runs)) == (0, 24 - 15)


def test_half_a_study_is_drawn_and_says_so(tmp_path, capsys):
    assert reproduce(tmp_path, "--only", "width-64")[0] == 0
    assert "(missing: width-128)" in capsys.readouterr().out
    about = figure(tmp_path, "fig2")
    assert about["missing"] == ["width-128"]
    assert list(about["comparisons"]) == ["width-64"]


def test_a_run_that_breaks_is_a_sentence_and_the_rest_is_drawn(tmp_path, capsys):
    code, _ = reproduce(tmp_path, start=FakeStart(codes={"muon-lr0.02-seed1": -9}, polls=0, finish=finish))
    assert code == 1
    assert "the same command tries it again" in capsys.readouterr().err
    assert figure(tmp_path, "fig1")["unfinished"] == ["width-64"]


def test_a_folder_of_compare_is_used_and_nothing_of_it_is_run(tmp_path):
    arguments = ["--model", "small", "--steps", "4", "--only", "muon", "--out", str(tmp_path / "mine")]
    PARAMETERS["small"] = 5
    assert compare.main(arguments, start=FakeStart(polls=0, finish=finish)) == 0
    settings = (tmp_path / "mine" / "compare.json").read_bytes()
    code, start = reproduce(tmp_path, "--use", f"width-256={tmp_path / 'mine'}", f"width-64={tmp_path / 'mine'}")
    assert code == 0
    assert len(start.runs) == 11  # of width-128 alone
    assert (tmp_path / "mine" / "compare.json").read_bytes() == settings
    curves = figure(tmp_path, "transfer")["data"]["curves"]
    assert [(c["comparison"], c["label"]) for c in curves] == [
        ("width-64", "muon"),
        ("width-128", "adamw"),
        ("width-128", "muon"),
        ("width-256", "muon"),
    ]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "not the record of a run"),
        (lambda text: text.replace('"elapsed": [0.0', '"elapsed": ["x"'), "a number in it is none"),
        (lambda text: text.replace('"elapsed": [0.0, ', '"elapsed": ['), "3 of 4 steps"),
        (lambda text: text.replace("finished", "done"), "status 'done'"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--report-only"]])
def test_a_damaged_run_file_is_named_and_nothing_is_run_or_drawn(done, capsys, damage, why, more):
    (run,) = (done / "out" / "width-128" / "runs").glob("muon-lr0.04-*")
    for path in (done / "out" / "figures").iterdir():
        path.unlink()
    text = (run / "result.json").read_text()
    (run / "result.json").write_text(damage(text))
    assert damage(text) != text
    code, start = reproduce(done, *more)
    error = capsys.readouterr().err
    assert (code, start.runs) == (2, [])
    assert str(run / "result.json") in error
    assert why in error
    assert "delete it" in error
    assert error.count("\n") == 1
    assert not list((done / "out" / "figures").glob("*"))


def test_a_run_file_that_is_gone_is_made_again(done):
    (run,) = (done / "out" / "width-128" / "runs").glob("muon-lr0.04-*")
    (run / "result.json").unlink()
    code, start = reproduce(done, "--only", "table")
    assert (code, start.runs) == (0, [run.name])


def test_a_damaged_record_is_named(done, capsys):
    for path in (done / "out" / "width-64" / "runs").glob("*/run.jsonl"):
        path.write_text("what?\nno\n")
    assert reproduce(done, "--report-only", "--only", "fig2")[0] == 2
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--jobs", "0"], "--jobs is 0"),
        (["--grid", "large"], "leave it out"),
        (["--only", "wdth"], "no comparison or figure 'wdth'"),
        (["--use", "a"], "is no NAME=FOLDER"),
        (["--use", "width-64=nowhere"], "there is no comparison in nowhere"),
        (["--report-only"], "start it without --report-only"),
        (["--figures", "/dev/null/figures"], "give --figures another folder"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(tmp_path, capsys, arguments, sentence):
    code, start = reproduce(tmp_path, *arguments)
    error = capsys.readouterr().err
    assert (code, start.runs) == (2, [])
    assert sentence in error
    assert error.count("\n") == 1


def test_flags_that_compare_does_not_know_name_their_comparison(tmp_path, capsys):
    (tmp_path / "s.toml").write_text('[[comparison]]\nname = "a"\nflags = ["--modle", "nano"]\n')
    assert cli.main([str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "the flags of the comparison a are not those" in capsys.readouterr().err


def test_the_time_left_is_of_the_whole_study(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    fake = FakeStart(polls=0, finish=finish)
    assert reproduce(tmp_path, "--only", "width-64", start=fake)[0] == 0
    found = {name: comparison.read(tmp_path / "out" / "width-64") for name in ("width-64",)}
    for name, model in (("width-128", "tiny"), ("width-256", "small")):
        out = str(tmp_path / "out" / name)
        found[name] = compare.prepare(compare.parse(["--model", model, "--only", "adamw", "--out", out]))
    ledger = Ledger(found, {"width-64": 0.05, "width-128": 1, "width-256": None})
    assert ledger.counts() == (13, 13 + 5 + 5)
    # The fake runs took 7 s where the study said 3 s, so a minute is 140 s here; of width 256 nothing is said.
    assert [ledger.one(name) for name in found] == [7, 140, 7]
    clock = StudyClock(2, ledger, "width-128")
    assert clock.left(10, []) == pytest.approx(5 * 140 / 2 + 5 * 7 / 2)
    clock.seconds.append(100.0)
    assert clock.left(10, []) == pytest.approx(5 * 100 / 2 + 5 * 7 / 2), "a run that ended replaces the guess"
