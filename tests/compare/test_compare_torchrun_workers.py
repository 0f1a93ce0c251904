"""Under torchrun every run of a comparison is trained by all ranks; the table is that of one process to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = "--only adamw --points 1 --scalar-points 1 --vocabulary 300 --model nano --context 16 --batch 4 --steps 6"
FLAGS += " --warmup 2"


def compare(start: list[str], text: Path, out: Path, *flags: str) -> str:
    """Returns what was said; the comparison is in ``out``."""
    command = [*start, "-m", "orthoshard", "compare", "--corpus", f"text:{text}", "--cache", str(text.parent / "cache")]
    command += [*FLAGS.split(), "--device", "cpu", "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    (record,) = (out / "runs").rglob("run.jsonl")
    events = map(json.loads, record.read_text().splitlines())
    return [event["loss"] for event in events if event["kind"] in ("step", "validation")]


@pytest.mark.slow
def test_two_ranks_compare_as_one_does(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 600)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = compare(torchrun, text, tmp_path / "two", "--fsdp", "2")
    compare([sys.executable], text, tmp_path / "one")
    assert said.count("adamw              lr") == 1
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(two) == len(one) > 6
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 1e-3
