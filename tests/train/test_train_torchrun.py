"""The command under torchrun: one rank speaks, a killed rank ends the others at once, and a restart goes on."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_kit import command, losses

from orthoshard.lab.train import atomic_dir, record
from processes import forkserver

STEPS = 24


def arguments(text: Path, out: Path, *flags: str, steps: int = STEPS) -> list[str]:
    settings = {
        "corpus": f"text:{text}",
        "vocabulary": 300,
        "cache": text.parent / "cache",
        "model": "nano",
        "context": 16,
        "batch": 4,
        "steps": steps,
        "checkpoint-every": 2,
        "validate-every": 8,
        "sample-tokens": 4,
        "device": "cpu",
        "timeout": 20,
        "out": out,
    }
    return [
        *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
        *flags,
    ]  # the last counts


def start(text: Path, out: Path, *flags: str, ranks: int = 2, restarts: int = 0, steps: int = STEPS):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m", "orthoshard", "train"]
    command += arguments(text, out, *flags, steps=steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def finished_steps(out: Path) -> int:
    path = out / record.NAME
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def weights(out: Path) -> dict[str, list[torch.Tensor]]:
    """The pieces of every tensor of the last checkpoint, after it was verified; whichever rank wrote them."""
    step = atomic_dir.steps(out / "checkpoints")[-1]
    found: dict[str, list[torch.Tensor]] = {}
    folder = out / "checkpoints" / atomic_dir.name_of(step)
    atomic_dir.verify(folder, step)
    for file in sorted(folder.glob("*.safetensors")):  # a folder in memory lists them in another order
        for name, tensor in load_file(file).items():
            found.setdefault(name, []).append(tensor)
    assert found
    return found


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(
        len(pieces) == len(other[name]) and all(map(torch.equal, pieces, other[name])) for name, pieces in one.items()
    )


def test_one_rank_speaks(text: Path, tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    given = arguments(text, tmp_path / "run", "--fsdp", "2", steps=3)
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = []
    for rank in range(2):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, **group}
        ranks.append(forkserver().Process(target=command, args=(tmp_path, given), kwargs=of_rank))
        ranks[-1].start()
    for process in ranks:
        process.join(100)
    err = "".join((tmp_path / f"err{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in ranks] == [0, 0], err
    out, silence = ((tmp_path / f"out{rank}").read_text() for rank in range(2))
    assert out.count("dion trains nano") == out.count("--- a sample") == out.count("validation loss") == 1
    assert not silence
    assert (tmp_path / "run/sample.txt").is_file()
    assert (tmp_path / "run/loss.png").is_file()
    assert "Warning" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--dp", "2", "--tp", "2"), r"--dp 2 x --fsdp 1 x --tp 2 make 4 processes, and torchrun started 2"),
        (("--tp", "2", "--model", "CONFIG"), r"--tp 2 does not divide the model's 3 attention heads"),
    ],
)
def test_an_error_is_said_once(flags: tuple[str, ...], sentence: str, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 48, '
        '"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 3}'
    )
    given = [str(config) if flag == "CONFIG" else flag for flag in flags]
    process = start(text, tmp_path / "run", *given)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert len(re.findall(sentence, err)) == 1, err
    assert err.count("orthoshard train:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "cut", "ranks"),
    [
        (1, ("--fsdp", "2"), 2),
        (5, ("--fsdp", "2", "--tp", "2"), 4),
        (20, ("--fsdp", "2"), 2),
        (5, ("--dp", "2"), 2),
        (3, ("--dp", "2", "--replica-sync", "factors"), 2),
    ],
)
def test_killed_ranks_and_restarts(kills: int, cut: tuple[str, ...], ranks: int, text: Path, tmp_path: Path) -> None:
    """A rank is killed at random moments of a run that torchrun restarts. Every rank that was not killed says why it
    ends; the run reaches the same weights and losses to the bit."""
    steps = max(STEPS, 6 * kills)  # every life but the last can be killed: each makes a step, and may lose two
    whole = start(text, tmp_path / "whole", *cut, ranks=ranks, steps=steps)
    assert whole.wait(120) == 0
    rng = random.Random(0)
    process = start(text, tmp_path / "run", *cut, ranks=ranks, restarts=kills, steps=steps)
    for _ in range(kills):
        seen = finished_steps(tmp_path / "run")
        known = set(workers(process.pid))
        deadline = time.monotonic() + 90
        while len(known) < ranks or finished_steps(tmp_path / "run") <= seen:  # this life has made a step
            known = set(workers(process.pid))
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(rng.choice(sorted(known)), signal.SIGKILL)
        started = time.monotonic()
        while set(workers(process.pid)) & known:  # the others end too
            assert time.monotonic() < started + 20
            time.sleep(0.01)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(re.findall(r"rank \d of \d ended, because another process is gone", err)) >= kills, err
    assert same(tmp_path / "run", tmp_path / "whole")
    found, expected = (record.read(tmp_path / name) for name in ("run", "whole"))
    assert losses(found) == losses(expected)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_hung_rank_is_given_up(text: Path, tmp_path: Path) -> None:
    """A rank that neither works nor dies: the other waits no longer than --timeout, and says for what."""
    process = start(text, tmp_path / "run", "--fsdp", "2", "--timeout", "8", steps=10_000)
    deadline = time.monotonic() + 90
    while not finished_steps(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hung, other = workers(process.pid)
    os.kill(hung, signal.SIGSTOP)
    started = time.monotonic()
    while other in workers(process.pid):
        assert time.monotonic() < started + 40
        time.sleep(0.1)
    waited = time.monotonic() - started
    os.kill(hung, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert waited >= 5, "a pause that short is no reason to give up"
    assert re.search(r"rank \d of 2 ended", err), err
