"""The command: from flags to plot, sample and the last line; Ctrl-C; exit codes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_kit import command, losses

from orthoshard.lab.train import cli, record
from orthoshard.lab.train.config import TrainConfig
from orthoshard.lab.train.display import Figures, display
from orthoshard.lab.train.presets import load_preset
from processes import forkserver


def flags(text: Path, *more: str) -> list[str]:
    return [
        *("--corpus", f"text:{text}", "--cache", str(text.parent / "cache"), "--vocabulary", "300"),
        *("--model", "nano", "--context", "16", "--batch", "2", "--warmup", "2", "--threads", "1"),
        *("--steps", "6", "--checkpoint-every", "2", "--validate-every", "3", "--validation-batches", "2"),
        *("--sample-tokens", "8", "--device", "cpu", *more),
    ]


def test_from_flags_to_the_last_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert cli.main(flags(text, "--out", str(folder), "--tensorboard", "--prompt", "abc")) == 0
    out = capsys.readouterr().out
    last = out.strip().splitlines()[-1]
    assert last.startswith("validation loss ")
    assert f"everything is in {folder}: run.jsonl, loss.png, sample.txt, checkpoints/" in last
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").read_text().startswith("abc")
    assert list((folder / "tensorboard").iterdir())
    head = record.read(folder)[0]
    assert head["config"]["schedule"]["steps"] == 6
    assert head["versions"]["torch"]
    steps = [event for event in record.read(folder) if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert all(event["seconds"] > event["optimizer_seconds"] > 0 for event in steps)


def test_same_sample_twice(text: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert cli.main(flags(text, "--out", str(tmp_path / name))) == 0
    assert (tmp_path / "a/sample.txt").read_text() == (tmp_path / "b/sample.txt").read_text()


def test_default_folders_are_numbered_and_the_latest_is_resumed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(flags(text)) == 0
    assert cli.main(flags(text, "--optimizer", "muon")) == 0
    assert cli.main(flags(text)) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["text-dion-001", "text-dion-002", "text-muon-001"]
    capsys.readouterr()
    assert cli.main(["--resume", "--steps", "8"]) == 0
    assert "everything is in runs/text-dion-002" in capsys.readouterr().out
    assert [e["step"] for e in record.read(Path("runs/text-dion-002")) if e["kind"] == "step"] == list(range(1, 9))


def test_an_existing_folder_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert cli.main(flags(text, "--out", str(tmp_path))) == 2
    said = capsys.readouterr().err
    assert "is already there; go on with it by --resume" in said
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_damaged_checkpoint_is_refused_and_the_offer_works(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert cli.main(flags(text, "--out", str(folder))) == 0
    before = losses(record.read(folder))
    (shard,) = (folder / "checkpoints/step-000006").glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 8
    shard.write_bytes(raw)
    assert cli.main(["--resume", "--out", str(folder)]) == 2
    assert "add --resume-from 4 to go on from there" in capsys.readouterr().err
    assert cli.main(["--resume-from", "4", "--out", str(folder)]) == 0
    assert losses(record.read(folder)) == before
    kept = {"step-000004", "step-000006", "set-aside-1-step-000006"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == kept


def test_a_record_that_lost_steps_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert cli.main(flags(text, "--out", str(folder))) == 0
    lines = (folder / "run.jsonl").read_bytes().splitlines(keepends=True)
    for left, lost in ((4, "lacks 4 steps, 3 to 6"), (0, "lacks 6 steps, 1 to 6")):
        (folder / "run.jsonl").write_bytes(b"".join(lines[:left]))
        capsys.readouterr()
        assert cli.main(["--resume", "--out", str(folder)]) == 0
        assert f"resumed from the checkpoint of step 6; run.jsonl {lost}" in capsys.readouterr().out


def test_stopped_before_the_first_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def at_once(_: bool) -> Generator[list[int]]:
        yield [signal.SIGTERM]

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_stop_signals", at_once)
        assert cli.main(flags(text, "--out", str(folder))) == 143
    said = capsys.readouterr().out
    assert "a checkpoint is written" not in said
    assert f"no checkpoint. Start over with: orthoshard train --resume --out {folder}" in said
    assert cli.main(["--resume", "--out", str(folder)]) == 0
    assert "there was no checkpoint; the run starts over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_stops_after_the_step_and_says_how_to_resume(
    number: signal.Signals, code: int, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = flags(text, "--out", str(folder), "--steps", "100000")
    process = forkserver().Process(target=command, args=(tmp_path, given), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints").exists() and time.monotonic() < deadline:
        assert process.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert process.exitcode == code, err
    assert f"orthoshard train --resume --out {folder}" in out
    assert "Traceback" not in err
    events = record.read(folder)
    stopped = events[-1]
    assert stopped["kind"] == "stopped"
    assert cli.main(["--resume", "--out", str(folder), "--steps", str(stopped["step"] + 2)]) == 0


def test_a_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background job starts with it ignored
    with cli._stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_keyboard_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    assert cli.main([]) == 130


def test_figures() -> None:
    figures = Figures(steps=10)
    step = {"kind": "step", "loss": 2.0, "seconds": 0.5, "optimizer_seconds": 0.1, "tokens": 100, "skipped": False}
    figures.see(step | {"step": 1})
    figures.see({"kind": "validation", "step": 1, "loss": 3.25})
    assert figures.texts() == {
        "loss": "2.000", "validation": "3.250", "tokens/s": "200", "optimizer": "20%", "left": "0:04",
    }  # fmt: skip
    figures.see(step | {"step": 2, "loss": float("nan"), "skipped": True})
    assert figures.texts()["loss"] == "2.000"
    assert figures.texts()["skipped"] == "1"


def test_live_display_on_a_terminal(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich writes to whatever stands for the terminal; all events pass through it."""
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(flags(text, "--out", str(tmp_path / "run"))) == 0
    seen = terminal.getvalue()
    assert "6/6" in seen
    assert "tokens/s" in seen
    assert "everything is in" in seen
    with display(TrainConfig(), tmp_path) as sink:
        sink({"kind": "resumed", "step": 3})
    assert "resumed from the checkpoint of step 3" in terminal.getvalue()


def test_no_flag_at_all_is_the_default_run() -> None:
    """`make train` gives no argument."""
    command = cli.parse([])
    assert command.config == load_preset("default")
