"""Kill a tiny run again and again, resume it each time, and compare what comes out with a run that was left alone.

    random RESUMES SEED   SIGKILL after a random time of the life's own processor, whatever else the machine does
    events EVERY          SIGKILL at the 1st, the (1+EVERY)th, ... file event of a run

A process that has all imported forks every life (it must run no backward pass itself: forked children could not).
Writes what it found as one JSON object; the test beside it judges.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from train_kit import losses, tensors_sha256, tiny_config, write_text

from orthoshard.lab.train import record
from orthoshard.lab.train.config import TrainConfig
from orthoshard.lab.train.data import prepare
from orthoshard.lab.train.loop import LAST, train
from orthoshard.lab.train.model import build_model

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fsync"}


def life(config: TrainConfig, folder: Path, at: int | None = None) -> int:
    """Fork a process that starts or resumes the run; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if at is not None:
            die_at(at, folder)
        train(config, folder, resume=LAST if (folder / record.NAME).exists() else None)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def die_at(number: int, folder: Path) -> None:
    """SIGKILL this process just before its ``number``-th file event below ``folder``."""
    count = 0

    def event(name: str, path: object) -> None:
        nonlocal count
        if name not in FILE_EVENTS or not isinstance(path, (str, os.PathLike)):
            return
        # What `shutil.rmtree` removes it names relative to its folder.
        if name in ("os.remove", "os.rmdir") or str(path).startswith(str(folder)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda name, args: event(name, args[0] if args else None))
    fsync = os.fsync  # the one event that Python does not report by itself

    def counted(descriptor: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = counted


def outcome(folder: Path) -> tuple[str, list[float]]:
    """The sha256 of the last checkpoint's tensors (weights and optimizer), and every loss of the record."""
    last = max((folder / "checkpoints").glob("step-*"))
    return f"{last.name} {tensors_sha256(last)}", losses(record.read(folder))


def killed(pid: int, after: float) -> bool:
    """Wait until the life has computed for ``after`` seconds, then kill; False where it had ended well by itself."""
    computed = (~pid << 3) | 2  # Linux's clock of the processor time of a process, as clock_getcpuclockid(3) has it
    while time.clock_gettime(computed) < after:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"a life failed with status {status}"
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def finish(config: TrainConfig, folder: Path) -> None:
    status = os.waitpid(life(config, folder), 0)[1]
    assert status == 0, f"a life that nobody killed failed with status {status}"


def main(root: Path, mode: str, number: int, seed: int = 0) -> None:
    text = write_text(root / "text.txt")
    steps = 40 if mode == "random" else 3
    config = tiny_config(text, steps=steps, checkpoint_every=1, validate_every=10)
    build_model(config.model, prepare(config.data).vocabulary, 0)  # so that every life finds its imports done
    finish(config, root / "reference")
    expected = outcome(root / "reference")
    run = root / "run"
    facts = {"kills": 0, "resumes": 0, "runs": 0, "equal": 0, "while_writing": 0, "in_record": 0}

    def look() -> None:
        """What state the kill left behind."""
        checkpoints = run / "checkpoints"
        facts["while_writing"] += any(checkpoints.glob(".*")) if checkpoints.exists() else 0
        facts["in_record"] += (run / record.NAME).exists() and not (run / record.NAME).read_bytes().endswith(b"\n")

    def close() -> None:
        facts["runs"] += 1
        facts["equal"] += outcome(run) == expected
        shutil.rmtree(run)

    if mode == "random":
        rng = random.Random(seed)
        while facts["resumes"] < number:
            facts["resumes"] += (run / record.NAME).exists()
            if killed(life(config, run), rng.uniform(0.0, 0.5)):
                facts["kills"] += 1
                look()
            else:
                close()
        if run.exists():
            finish(config, run)
            close()
    else:
        at = 1
        while True:
            status = os.waitpid(life(config, run, at), 0)[1]
            if status == 0:  # it had fewer events than that
                close()
                break
            assert os.WIFSIGNALED(status), f"a life failed with status {status}"
            facts["kills"] += 1
            look()
            facts["resumes"] += (run / record.NAME).exists()
            finish(config, run)
            close()
            at += number
    (root / "facts.json").write_text(json.dumps(facts))
