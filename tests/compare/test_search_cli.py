"""The verb from its flags to its files, with runs that take no time; what is stopped or killed goes on; bad input."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
from pathlib import Path

import optuna
import pytest
from compare_fakes import BOTTOM, FakeStart, FakeWorker, make_outcome

from orthoshard.lab.compare import settings, worker
from orthoshard.lab.compare.search import cli
from orthoshard.lab.report.cli import main as report_main
from orthoshard.lab.train import cli as train_cli
from orthoshard.lab.train.record import NAME

TINY = ["--model", "nano", "--vocabulary", "300", "--context", "16", "--steps", "40", "--batch", "2"]


def sweep(out: Path, *more: str, start=None) -> tuple[int, FakeStart]:
    fake = start or FakeStart(polls=0)
    return cli.main([*TINY, "--out", str(out), "--trials", "4", *more], start=fake), fake


def results(out: Path):
    """With the trials as one list."""
    found = json.loads((out / "results.json").read_text())
    validated = {run["label"]: run["validations"][-1][0] for run in found["runs"]}
    found["trials"] = [
        {
            "trial": int(row["label"].split("-")[1]),
            "status": row["status"],
            "loss": row["loss"],
            "step": validated.get(row["label"], 0),
            "optimizer": rival["config"],
        }
        for row, rival in zip(found["rows"], found["rivals"], strict=True)
    ]
    return found


def test_a_sweep_leaves_heat_map_and_json_and_prints_flags_that_train_takes(tmp_path: Path, capsys, real_picture):
    out = tmp_path / "new" / "s"
    code, start = sweep(out, "--trials", "8")
    assert code == 0
    assert len(start.runs) == 8
    found = results(out)
    assert [trial["loss"] for trial in found["trials"]] == sorted(trial["loss"] for trial in found["trials"])
    assert len(found["trials"]) == 8
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "8 trials: 8 finished" in shown
    (command,) = [line for line in shown.splitlines() if line.startswith("orthoshard train")]
    assert command == found["best"]
    again = train_cli.parse(shlex.split(command)[2:]).config
    best = found["trials"][0]["optimizer"]
    for key in ("name", "lr", "rank_fraction", "momentum", "weight_decay"):
        assert getattr(again.optimizer, key) == best[key]
    assert (again.model.name, again.schedule.steps, again.data.vocabulary) == ("nano", 40, 300)
    first = next(trial for trial in found["trials"] if trial["trial"] == 0)["optimizer"]
    assert (first["lr"], first["rank_fraction"], first["momentum"]) == (0.02, 0.25, 0.95)  # the defaults come first
    lowest = BOTTOM["dion"][2]
    assert found["trials"][0]["loss"] - lowest < 0.3 * (found["trials"][-1]["loss"] - lowest)


def test_a_report_shows_a_search(tmp_path: Path, capsys):
    sweep(tmp_path / "s", "--optimizers", "dion", "adamw")
    assert report_main([str(tmp_path / "s"), "--no-calculator", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "trial-3-dion" in page or "trial-3-adamw" in page


def test_the_same_command_goes_on_and_more_trials_continue_it(tmp_path: Path):
    sweep(tmp_path)
    assert sweep(tmp_path)[1].runs == []
    assert len(sweep(tmp_path, "--trials", "6", "--sampler", "random", "--no-prune")[1].runs) == 2
    assert len(results(tmp_path)["trials"]) == 6


def test_several_optimizers_are_searched_together(tmp_path: Path):
    code, start = sweep(tmp_path, "--optimizers", "dion", "muon", "adamw", "--jobs", "2", "--trials", "6")
    assert code == 0
    assert start.most_at_once == 2
    names = {trial["optimizer"]["name"] for trial in results(tmp_path)["trials"]}
    assert names == {"dion", "muon", "adamw"}
    firsts = [t["optimizer"]["name"] for t in sorted(results(tmp_path)["trials"], key=lambda t: t["trial"])[:3]]
    assert firsts == ["dion", "muon", "adamw"]


class Interrupting(FakeStart):
    """Ctrl-C while the run of that number is at work."""

    def __init__(self, number: int) -> None:
        super().__init__(polls=0)
        self.number = number

    def __call__(self, folder: Path, keep_open):
        if len(self.workers) == self.number:
            raise KeyboardInterrupt
        return super().__call__(folder, keep_open)


def test_stopped_by_ctrl_c_it_draws_and_ends_as_if_nothing_had_happened(tmp_path: Path, capsys):
    sweep(tmp_path / "whole", "--trials", "6")
    for number in (0, 3, 1):
        code, _ = sweep(tmp_path / "stopped", "--trials", "6", start=Interrupting(number))
        assert code == 130
        assert "the same command goes on" in capsys.readouterr().err
    assert sweep(tmp_path / "stopped", "--trials", "6")[0] == 0
    assert results(tmp_path / "stopped")["trials"] == results(tmp_path / "whole")["trials"]


def test_killed_between_drawing_and_starting(tmp_path: Path):
    """A trial is in the database with nothing, or half of it, drawn; no run was begun."""
    sweep(tmp_path, "--trials", "1")
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.ask()
    study.ask().suggest_float("dion.lr", 0.00125, 0.08, log=True)
    code, start = sweep(tmp_path, "--trials", "4", "--jobs", "3")
    assert code == 0
    assert sorted(trial["trial"] for trial in results(tmp_path)["trials"]) == [0, 1, 2, 3]
    assert len(start.runs) == 3


def test_a_run_that_was_killed_is_tried_again_by_the_next_command(tmp_path: Path, capsys):
    code, start = sweep(tmp_path, start=FakeStart(codes={"trial-2": -9}, polls=0))
    assert code == 1
    assert len(start.runs) == 4
    assert "signal 9" in capsys.readouterr().err
    assert [trial["status"] for trial in results(tmp_path)["trials"]].count("running") == 1
    code, start = sweep(tmp_path)
    assert code == 0
    assert [name[:8] for name in start.runs] == ["trial-2-"]
    assert {trial["status"] for trial in results(tmp_path)["trials"]} == {"finished"}


class Slow(FakeStart):
    """From the sixth on, runs validate far above the others and do not end by themselves."""

    def __call__(self, folder: Path, keep_open) -> FakeWorker:
        hopeless = len(self.workers) >= 6
        made = super().__call__(folder, keep_open)
        head = {"kind": "run", "step": 0, "data": {"digest": "d"}, "machine": {}, "versions": {}}
        losses = [(0, 7.0), (10, 6.9 if hopeless else 5.0)]
        lines = [head, *({"kind": "validation", "step": step, "loss": loss} for step, loss in losses)]
        (folder / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.left = 10**9 if hopeless else 1
        return made


def validated(folder: Path) -> None:
    """A result whose validations are those of the record."""
    given = json.loads((folder / "job.json").read_text())
    found = make_outcome(
        label=given["label"], lr=given["config"]["optimizer"]["lr"], k=given["spot"][0],
        validations=[(0, 7.0), (10, 5.0), (40, 4.0)],
    )  # fmt: skip
    worker.jobs.save(folder / worker.jobs.RESULT, found)


def test_runs_behind_the_median_are_stopped(tmp_path: Path, capsys):
    start = Slow(finish=validated)
    code, _ = sweep(tmp_path, "--trials", "8", start=start)
    assert code == 0
    assert [made.terminated for made in start.workers] == [False] * 6 + [True] * 2
    found = results(tmp_path)["trials"]
    assert [trial["status"] for trial in found] == ["finished"] * 6 + ["pruned"] * 2
    assert found[-1]["step"] == 10
    assert found[-1]["loss"] == 6.9
    assert "pruned at step 10" in capsys.readouterr().out
    assert sweep(tmp_path, "--trials", "8")[1].runs == []


def test_all_diverged_is_no_error_and_names_no_best(tmp_path: Path, capsys, real_picture):
    code, _ = sweep(tmp_path, "--lr", "0.6", "2")
    assert code == 0
    found = results(tmp_path)
    assert found["best"] is None
    assert {trial["status"] for trial in found["trials"]} == {"diverged"}
    assert {trial["loss"] for trial in found["trials"]} == {None}
    assert "orthoshard train" not in capsys.readouterr().out


def test_other_settings_are_refused_and_change_nothing(tmp_path: Path, capsys):
    sweep(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, name in (
        (["--steps", "50"], "base.schedule.steps = 40"),
        (["--lr", "0.1"], "space.lr = []"),
        (["--seed", "1"], "seed = 0"),
        (["--validate-every", "3"], "base.record.validate_every"),
    ):
        code, start = sweep(tmp_path, *flags)
        assert code == 2
        assert start.runs == []
        assert name in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_report_only_draws_the_same_again_and_runs_nothing(tmp_path: Path):
    sweep(tmp_path)
    before = results(tmp_path)["trials"]
    for name in ("heatmap.png", "results.json"):
        (tmp_path / name).unlink()
    code, start = sweep(tmp_path, "--report-only")
    assert code == 0
    assert start.runs == []
    assert results(tmp_path)["trials"] == before
    assert (tmp_path / "heatmap.png").exists()


def test_other_data_is_refused(tmp_path: Path, monkeypatch, capsys):
    sweep(tmp_path)
    monkeypatch.setattr(settings, "try_out", lambda base, optimizers: "e")
    assert sweep(tmp_path)[0] == 2
    assert "on other data" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"not a database, but long enough to be one" * 40, b""])
def test_a_damaged_study_is_refused_or_begun_anew(tmp_path: Path, damage, capsys):
    sweep(tmp_path)
    (tmp_path / "study.db").write_bytes(damage)
    code, start = sweep(tmp_path)
    if damage:
        assert code == 2
        assert "is no study of this search" in capsys.readouterr().err
        assert (tmp_path / "study.db").read_bytes() == damage
    else:  # its runs are on the disk: none is made twice
        assert code == 0
        assert start.runs == []


def test_a_database_of_something_else_is_refused(tmp_path: Path, capsys):
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("CREATE TABLE studies (nonsense TEXT)")
    assert sweep(tmp_path)[0] == 2
    assert "is no study of this search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trials", "0"], "--trials is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--rank-fraction", "1/0"], "--rank-fraction 1/0"),
        (["--rank-fraction", "2"], "at most 1"),
        (["--optimizers", "sgd"], "no optimizer 'sgd'"),
        (["--momentum", "0.9", "1"], "not including, 1"),
        (["--steps", "0"], "--steps is 0"),
        (["--preset", "nope"], "no preset 'nope'"),
        (["--report-only"], "there is no comparison in"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path: Path, flags, sentence, capsys):
    code, start = sweep(tmp_path / "s", *flags)
    assert code == 2
    assert start.runs == []
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_real_runs_one_after_the_other(tmp_path: Path, monkeypatch, real_check):
    """The check of data and optimizers, training, and a run that was begun before: the worker in this process."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {k} of {k * k}: to be, or not to be.\n" for k in range(2000)))
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)

    def work(folder: Path) -> None:
        assert worker.main(folder, os.getppid()) == 0

    flags = ["--corpus", f"text:{text}", "--cache", str(tmp_path / "cache"), "--threads", "1", "--steps", "4"]
    flags += ["--validate-every", "2", "--optimizers", "dion", "adamw", "--trials", "3"]
    code, _ = sweep(tmp_path / "s", *flags, start=FakeStart(polls=0, finish=work))
    assert code == 0
    found = results(tmp_path / "s")["trials"]
    assert {trial["status"] for trial in found} == {"finished"}
    assert all(4 < trial["loss"] < 6 for trial in found)
