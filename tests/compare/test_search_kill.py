"""A real sweep killed without warning, its workers alive: the same command finishes it as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def command(out: Path, text: Path) -> list[str]:
    return [
        sys.executable, "-m", "orthoshard", "compare", "--search", "--out", str(out), "--trials", "2",
        "--corpus", f"text:{text}", "--cache", str(text.parent / "cache"), "--vocabulary", "300", "--model", "nano",
        "--context", "16", "--batch", "4", "--steps", "30", "--validate-every", "10", "--validation-batches", "2",
        "--checkpoint-every", "5", "--threads", "1", "--device", "cpu", "--no-prune",
    ]  # fmt: skip


def wait_for(folder: Path, trial: int, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for record in folder.glob(f"runs/trial-{trial}-*/run.jsonl"):
            if f'"kind": "step", "step": {step},' in record.read_text():
                return
        time.sleep(0.02)
    pytest.fail(f"trial {trial} did not come to step {step}")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ten processes that import torch: minutes on a busy core
def test_killed_twice_and_gone_on_with(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {k} of {k * k}: to be, or not to be.\n" for k in range(3000)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, text), check=True, stdout=subprocess.DEVNULL, timeout=600)
    for trial, step, how in ((0, 12, signal.SIGKILL), (1, 7, signal.SIGINT)):
        process = subprocess.Popen(command(killed, text), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(killed, trial, step)
        process.send_signal(how)
        code = process.wait(300)
        assert code == (130 if how == signal.SIGINT else -how)
        process.stderr.close()
    subprocess.run(command(killed, text), check=True, stdout=subprocess.DEVNULL, timeout=600)
    found, expected = (json.loads((out / "results.json").read_text()) for out in (killed, whole))
    assert found["rivals"] == expected["rivals"]
    same = ("label", "status", "train", "validations")
    assert [[run[key] for key in same] for run in found["runs"]] == [
        [run[key] for key in same] for run in expected["runs"]
    ]
    assert {run["status"] for run in found["runs"]} == {"finished"}
