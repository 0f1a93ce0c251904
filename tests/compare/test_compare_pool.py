"""The pool with workers that take no time: what runs, how often, and what a kill or a broken run changes."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from compare_fakes import FakeStart, write_result

from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.comparison import Comparison
from orthoshard.lab.compare.folder import RUNS, lock
from orthoshard.lab.compare.grid import Grid, Spot
from orthoshard.lab.compare.pool import LOG, Active, Listener, Start, run_all, stop
from orthoshard.lab.compare.rivals import DEFAULT
from orthoshard.lab.train.config import TrainConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.verb import _Terminated


def comparison(folder: Path, **changes) -> Comparison:
    chosen = [rival for rival in DEFAULT if rival.label in ("adamw", "muon", "dion-1/4")]
    rivals = tuple(replace(rival, config=replace(rival.config, scalar_lr=0.012)) for rival in chosen)
    values = {"grid": Grid(seeds=(0, 1)), "reference": "adamw", "digest": "d", "rivals": rivals} | changes
    return Comparison(folder, TrainConfig(), **values)


def run(made: Comparison, start: Start, parallel: int = 1, listener: Listener | None = None) -> list[str]:
    return run_all(made.wanted, made.folder / RUNS, parallel, listener or Listener(), start=start, poll_seconds=0.0)


# adamw has its best in the middle of both grids; dion's lr is two doublings above, muon's scalar_lr one: these grow
EXPECTED = 3 + 2 + 3 + 3 + 5 + 2 + 3  # and one more seed each


def test_every_run_once(tmp_path: Path):
    start = FakeStart()
    assert run(comparison(tmp_path), start) == []
    assert len(start.runs) == len(set(start.runs)) == EXPECTED
    states = comparison(tmp_path).states(comparison(tmp_path).collect())
    assert {label: state.best for label, state in states.items()} == {
        "adamw": (0, 0),
        "muon": (0, 1),
        "dion-1/4": (2, 0),
    }


def test_rivals_take_turns(tmp_path: Path):
    start = FakeStart()
    run(comparison(tmp_path), start)
    assert [name.split("-")[0] for name in start.runs[:6]] == ["adamw", "muon", "dion"] * 2


@pytest.mark.parametrize("parallel", [2, 3])
def test_several_at_once(tmp_path: Path, parallel: int):
    start = FakeStart(polls=3)
    run(comparison(tmp_path), start, parallel)
    assert len(start.runs) == len(set(start.runs)) == EXPECTED
    assert start.most_at_once == parallel


class Kill(BaseException):
    """What no code expects."""


@pytest.mark.parametrize("after", range(1, EXPECTED, 4))
def test_killed_between_runs_it_goes_on(tmp_path: Path, after: int):
    class KillAfter(Listener):
        count = 0

        def finished(self, job, found, seconds):
            self.count += 1
            if self.count == after:
                raise Kill

    first, second = FakeStart(), FakeStart()
    with pytest.raises(Kill):
        run(comparison(tmp_path), first, listener=KillAfter())
    run(comparison(tmp_path), second)
    assert sorted(first.runs + second.runs) == sorted(set(first.runs + second.runs)), "a run was done twice"
    assert len(first.runs + second.runs) == EXPECTED


def test_killed_in_a_run_that_run_starts_again_in_its_folder(tmp_path: Path):
    class KillInside(Listener):
        def watch(self, active):
            if len(start.runs) >= 5:
                raise Kill

    start = FakeStart(polls=3)
    with pytest.raises(Kill):
        run(comparison(tmp_path), start, parallel=2, listener=KillInside())
    cut_short = {worker.folder.name for worker in start.workers if worker.terminated}
    assert cut_short, "a worker was left behind"
    again = FakeStart()
    run(comparison(tmp_path), again)
    assert set(start.runs) & set(again.runs) == cut_short
    assert len(set(start.runs) | set(again.runs)) == EXPECTED


def test_a_worker_that_dies_is_told_and_left_out_and_tried_again_next_time(tmp_path: Path):
    start = FakeStart(codes={"muon-lr0.01-": -9})
    said: list[str] = []

    class Hear(Listener):
        def failed(self, job, sentence):
            said.append(sentence)

    broken = run(comparison(tmp_path), start, listener=Hear())
    assert len(broken) == 1
    assert broken == said
    assert "muon at lr 0.01, scalar lr 0.012 ended with signal 9" in broken[0]
    assert start.runs.count(next(name for name in start.runs if name.startswith("muon-lr0.01-"))) == 1
    assert sum(name.startswith("dion") for name in start.runs) == 8, "the others were not finished"
    again = FakeStart()
    assert run(comparison(tmp_path), again) == []
    assert [name.rsplit("-", 1)[0] for name in again.runs] == [
        "muon-lr0.01-seed0",
        *["muon-lr0.02-seed0"] * 3,
        "muon-lr0.02-seed1",
    ]


def test_a_good_exit_without_a_result_is_broken_too(tmp_path: Path):
    start = FakeStart(finish=lambda folder: None)
    broken = run(comparison(tmp_path, grid=Grid(points=1, most=1, scalar_points=1)), start)
    assert len(broken) == 3
    assert "no result" in broken[0]


def test_what_the_user_must_put_right_ends_it_with_the_workers_sentence(tmp_path: Path):
    class Refuse(FakeStart):
        def __call__(self, folder, keep_open):
            (folder / LOG).write_text("Traceback of something\nthe disk is full; make room.\n")
            return super().__call__(folder, keep_open)

    start = Refuse(codes={"muon-lr0.02-": 2}, polls=1)
    slow = Refuse(polls=1000)
    with pytest.raises(UserError, match="the disk is full; make room"):
        run(comparison(tmp_path), lambda folder, fds: (start if folder.name[:4] == "muon" else slow)(folder, fds), 3)
    assert [worker.terminated for worker in slow.workers] == [True, True], "the others at work were not stopped"
    assert len(start.workers) == 1


@pytest.mark.parametrize("meanwhile", [subprocess.TimeoutExpired("worker", 0), KeyboardInterrupt(), _Terminated()])
def test_a_worker_that_does_not_stop_is_made_to(meanwhile: BaseException, tmp_path: Path):
    class Stubborn:
        killed = terminated = False

        def terminate(self):
            self.terminated = True

        def wait(self, timeout=None):
            if not self.killed:
                raise meanwhile
            return -9

        def kill(self):
            self.killed = True

        def poll(self):
            return None

    worker = Stubborn()
    job = jobs.make(DEFAULT[0], Spot(0, 0, 0), TrainConfig())
    stop([Active(job, tmp_path, worker)], patience=0.0)
    assert worker.terminated
    assert worker.killed


def test_runs_on_other_data_are_refused(tmp_path: Path):
    run(comparison(tmp_path), FakeStart(finish=lambda folder: write_result(folder, digest="d")))
    with pytest.raises(UserError, match="saw other data"):
        comparison(tmp_path, digest="other").collect()


def test_one_comparison_at_a_time(tmp_path: Path, capsys):
    with lock(tmp_path) as held:
        assert len(held) == 1
        with (
            pytest.raises(UserError, match="another comparison is at work"),
            lock(tmp_path, patience=0.3),
        ):
            pytest.fail("both got it")
    assert capsys.readouterr().out == f"waiting for another comparison in {tmp_path} to end\n"
    with lock(tmp_path, patience=0.0):
        pass


def test_progress_is_read_from_the_record(tmp_path: Path):
    active = Active(jobs.make(DEFAULT[0], Spot(0, 0, 0), TrainConfig()), tmp_path, FakeStart()(tmp_path, ()))
    assert active.step() == 0
    record = tmp_path / "run.jsonl"
    record.write_text('{"kind": "run", "step": 0}\n{"kind": "step", "step": 1}\n{"kind": "step", "st')
    assert active.step() == 1
    with record.open("a") as file:
        file.write('ep": 2}\n{"kind": "validation", "step": 2}\n')
    assert active.step() == 2
    record.write_text('{"kind": "run", "step": 0}\n')  # cut: it goes on from an earlier checkpoint
    with record.open("a") as file:
        file.write('{"kind": "step", "step": 1}\n')
    assert active.step() == 1
