"""Real runs in processes of their own: killed at any place they end as if nothing had happened; a run that diverges
has an outcome; an orphan stops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orthoshard.lab.bench.files import write_json
from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare import worker
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.job import Job
from orthoshard.lab.compare.pool import LOG, REFUSED, start_process
from orthoshard.lab.compare.rivals import DEFAULT
from orthoshard.lab.train.config import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RecordConfig,
    ScheduleConfig,
    TrainConfig,
)
from orthoshard.lab.train.data import prepare


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    text.write_text("".join(f"Line {k} of {k * k}: to be, or not to be.\n" for k in range(3000)))
    config = TrainConfig(
        data=DataConfig(corpus=f"text:{text}", vocabulary=300, cache=folder / "cache"),
        model=ModelConfig(name="nano", context=16),
        schedule=ScheduleConfig(steps=60, batch=4, warmup=4),
        record=RecordConfig(validate_every=20, validation_batches=2, checkpoint_every=10, keep=1, sample_tokens=0),
        machine=MachineConfig(device="cpu", threads=1),
        max_skipped=3,
    )
    prepare(config.data)
    return config


def place(folder: Path, base: TrainConfig, lr: float | None = None) -> tuple[Path, Job]:
    rival = DEFAULT[4] if lr is None else replace(DEFAULT[0], config=replace(DEFAULT[0].config, lr=lr))
    made = jobs.make(rival, Spot(0, 0, 0), base)
    folder.mkdir()
    write_json(folder / jobs.SETTINGS, made.settings())
    return folder, made


def here(folder: Path, monkeypatch) -> int:
    """The worker in this process, without its signal handlers."""
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    return worker.main(folder, os.getppid())


def wait_for_step(folder: Path, step: int, process) -> None:
    deadline = time.monotonic() + 120
    wanted = f'"kind": "step", "step": {step},'
    while time.monotonic() < deadline:
        record = folder / "run.jsonl"
        if record.exists() and wanted in record.read_text():
            return
        assert process.poll() is None, (folder / LOG).read_text()
        time.sleep(0.02)
    pytest.fail("the run did not come so far")


def losses(folder: Path):
    found = jobs.load(folder / jobs.RESULT)
    assert found is not None
    assert found.status == "finished"
    return found.train, found.validations


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory):
    """The losses of the run that nobody disturbed."""
    folder, _ = place(tmp_path_factory.mktemp("whole") / "run", base)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert here(folder, monkeypatch) == worker.DONE
    assert not (folder / "checkpoints").exists(), "checkpoints of a finished run stay on the disk"
    found = losses(folder)
    assert [step for step, _ in found[1]] == [0, 20, 40, 60]
    assert found[1][-1][1] < found[1][0][1] - 0.5, "it learned nothing"
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_in_a_run_it_goes_on_to_the_same_losses(tmp_path: Path, base, whole, monkeypatch, number):
    for attempt in range(5):  # a run may be faster than the signal
        folder, _ = place(tmp_path / f"run {attempt}", base)
        process = start_process(folder)
        assert isinstance(process, subprocess.Popen)
        wait_for_step(folder, 25, process)
        process.send_signal(number)
        code = process.wait(60)
        if not (folder / jobs.RESULT).exists():
            break
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else worker.STOPPED)
    assert (folder / "checkpoints").is_dir()
    assert here(folder, monkeypatch) == worker.DONE
    assert losses(folder) == whole
    assert "resumed" in (folder / "run.jsonl").read_text()


def test_killed_before_its_first_checkpoint_it_starts_over(tmp_path: Path, base, whole, monkeypatch):
    folder, _ = place(tmp_path / "run", base)
    assert here(folder, monkeypatch) == worker.DONE
    lines = (folder / "run.jsonl").read_text().splitlines(keepends=True)
    (folder / jobs.RESULT).unlink()
    (folder / "run.jsonl").write_text("".join(lines[:5]) + lines[5][:10])  # a few steps, and a torn line
    assert here(folder, monkeypatch) == worker.DONE
    assert losses(folder) == whole


def test_killed_between_its_last_step_and_its_result(tmp_path: Path, base, whole, monkeypatch):
    folder, _ = place(tmp_path / "run", base)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert here(folder, monkeypatch) == worker.DONE
    (folder / jobs.RESULT).unlink()
    assert here(folder, monkeypatch) == worker.DONE
    assert losses(folder) == whole


def test_a_run_that_diverges_has_an_outcome(tmp_path: Path, base, monkeypatch):
    folder, made = place(tmp_path / "run", base, lr=1e30)
    assert here(folder, monkeypatch) == worker.DONE
    found = jobs.load(folder / jobs.RESULT)
    assert found is not None
    assert found.status == "diverged"
    assert found.loss == float("inf")
    assert found.lr == made.lr == 1e30


def test_what_the_user_must_put_right_is_the_last_line(tmp_path: Path, base, monkeypatch, capsys):
    short = tmp_path / "short.txt"
    short.write_text("To be. " * 10)
    folder, _ = place(tmp_path / "run", replace(base, data=replace(base.data, corpus=f"text:{short}")))
    assert here(folder, monkeypatch) == REFUSED
    assert "give more text" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (folder / jobs.RESULT).exists()


def test_an_orphan_stops_with_a_checkpoint(tmp_path: Path, base):
    """The comparison is killed outright; its worker notices, and leaves the folder to the next one."""
    folder, _ = place(tmp_path / "run", replace(base, schedule=replace(base.schedule, steps=100_000)))
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from orthoshard.lab.compare.pool import start_process\n"
            f"print(start_process(Path({str(folder)!r})).pid, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    wait_for_step(folder, 3, parent)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while '"kind": "stopped"' not in (folder / "run.jsonl").read_text():
        assert time.monotonic() < deadline, f"process {orphan} goes on without its parent"
        time.sleep(0.1)
    assert any((folder / "checkpoints").iterdir())
