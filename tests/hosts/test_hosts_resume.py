"""Every example of a host trains, is stopped or killed in the middle, goes on by its host's own means, and ends with
the weights of a run that was left alone, bit for bit."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
STOP, LAST_SAVED = 33, 30
NEEDS = {
    "pytorch": ["transformers"],
    "hf_trainer": ["transformers", "accelerate"],
    "trl_sft": ["trl"],
    "accelerate_loop": ["accelerate", "transformers"],
    "lightning_module": ["lightning", "transformers"],
    "torchtitan_loop": ["torchtitan", "transformers"],
}
ON_CPU = Path(__file__).parent / "accelerate_on_cpu.py"  # Accelerate shards on no CPU: see there
CREWS = {
    "pytorch-ddp": ("pytorch", [EXAMPLES / "pytorch.py", "--ddp"]),
    "pytorch-fsdp2": ("pytorch", [EXAMPLES / "pytorch.py", "--fsdp2"]),
    "accelerate-ddp": ("accelerate_loop", [EXAMPLES / "accelerate_loop.py"]),
    "accelerate-fsdp2": ("accelerate_loop", [ON_CPU, "--fsdp2"]),
    "lightning-fsdp2": ("lightning_module", [Path(__file__).parent / "lightning_fsdp2.py"]),
    "torchtitan-fsdp2": ("torchtitan_loop", [EXAMPLES / "torchtitan_loop.py"]),
}


class Stopped(Exception):
    pass


def host_of(name):
    for module in NEEDS[name]:
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'orthoshard[hosts]'")


def same(first, second):
    a, b = (torch.load(out / "final.pt", weights_only=True) for out in (first, second))
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "name", [*(n for n in NEEDS if n != "trl_sft"), pytest.param("trl_sft", marks=pytest.mark.slow)]
)
def test_stopped_by_an_error_it_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    host_of(name)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tiny = importlib.import_module("tiny_llama")
    example = importlib.import_module(name)
    seen = []

    def run(out, stop=None):
        def report(step, loss):
            seen.append((step, loss))
            if step == stop:
                raise Stopped

        monkeypatch.setattr(tiny, "report", report)
        seen.clear()
        torch.manual_seed(len(str(out)))  # no run may lean on what the one before left behind
        example.main(["--out", str(out)])
        return list(seen)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    losses = run(whole)
    assert [step for step, _ in losses] == list(range(1, 51))
    assert losses[-1][1] < losses[0][1] - 1.5
    with pytest.raises(Stopped):
        run(broken, STOP)
    assert not (broken / "final.pt").exists()
    assert [step for step, _ in run(broken)] == list(range(LAST_SAVED + 1, 51))
    assert same(whole, broken)


def killed(command, out):
    """Run the command, and SIGKILL it with all its children once it has reported step STOP."""
    with subprocess.Popen(
        [*command, "--out", out], stdout=subprocess.PIPE, text=True, start_new_session=True, env=quiet()
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(f"step {STOP} "):
                    break
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def finished(command, out):
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, env=quiet(), timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("step ")]


def quiet():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}


def survives(command, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finished(command, whole) == list(range(1, 51))
    killed(command, broken)
    assert not (broken / "final.pt").exists()
    assert finished(command, broken) == list(range(LAST_SAVED + 1, 51))
    assert same(whole, broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_killed_it_goes_on_bit_for_bit(name, tmp_path):
    host_of(name)
    survives([sys.executable, EXAMPLES / f"{name}.py"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("crew", CREWS)
def test_killed_on_two_processes_it_goes_on_bit_for_bit(crew, tmp_path):
    name, script = CREWS[crew]
    host_of(name)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    survives([*torchrun, *script], tmp_path)
