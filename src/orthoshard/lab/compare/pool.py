"""Run the wanted jobs, each in its own process, several at once, until none is left.

The list of wanted jobs is made again after every run (see `grid`), and finished runs are read from disk, so a
comparison that was killed at any moment continues where it was. The pools of joblib and optuna, which run pickled
calls, do not serve: a run here must be a process that stops with a checkpoint when asked, that can be killed without
harm to others, that can be a rank under torchrun, and that is found again on disk.
May import ``orthoshard.lab.compare`` and ``orthoshard.lab.train``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from orthoshard.lab.bench.files import write_json
from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.job import Job, Outcome
from orthoshard.lab.train import record
from orthoshard.lab.train.errors import UserError

LOG = "log.txt"
REFUSED = 2  # a worker's exit code where the user has to put something right
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # for a worker that was asked to stop: a step and a checkpoint


class Worker(Protocol):
    """The methods of a process that the pool needs; `subprocess.Popen` has them."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[Path, Sequence[int]], Worker]


def start_process(folder: Path, keep_open: Sequence[int] = (), environment: Mapping[str, str] | None = None) -> Worker:
    """Start the worker of the job in ``folder``, in its own session: Ctrl-C reaches it only through the pool."""
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "orthoshard.lab.compare.worker", str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=tuple(keep_open),
            start_new_session=True,
            env=environment,
        )


@dataclass
class Active:
    """A running job."""

    job: Job
    folder: Path
    worker: Worker
    started: float = field(default_factory=time.monotonic)
    _offset: int = 0
    _step: int = 0

    def step(self) -> int:
        """Return the last step in its record. Only new lines are read."""
        try:
            with (self.folder / record.NAME).open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0  # cut, because the run goes on from a checkpoint
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return self._step
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            event = json.loads(line)
            if event["kind"] in ("step", "resumed"):
                self._step = int(event["step"])
        return self._step


class Listener:
    """The base of displays: a listener that ignores every event."""

    def finished(self, job: Job, found: Outcome, seconds: float) -> None: ...

    def failed(self, job: Job, sentence: str) -> None: ...

    def watch(self, active: Sequence[Active]) -> None: ...


def run_all(
    wanted: Callable[[], list[Job]],
    folder: Path,
    parallel: int,
    listener: Listener,
    start: Start = start_process,
    keep_open: Sequence[int] = (),
    poll_seconds: float = POLL_SECONDS,
) -> list[str]:
    """Run jobs until none is wanted, and return a sentence for every job that failed and was left out.

    A run that diverges has an outcome like any other. Raises ``UserError`` with the worker's own sentence if the user
    has to correct something. In that case, and on Ctrl-C, running jobs stop with a checkpoint.
    """
    active: list[Active] = []
    broken: dict[str, str] = {}
    try:
        while True:
            busy = {each.job.folder for each in active} | broken.keys()
            for job in [job for job in wanted() if job.folder not in busy][: parallel - len(active)]:
                place = folder / job.folder
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / jobs.SETTINGS, job.settings())
                active.append(Active(job, place, start(place, keep_open)))
            if not active:
                return list(broken.values())
            while not (ended := [each for each in active if each.worker.poll() is not None]):
                listener.watch(active)
                time.sleep(poll_seconds)
            for each in ended:
                active.remove(each)
                found = jobs.load(each.folder / jobs.RESULT)
                if each.worker.poll() == REFUSED:
                    raise UserError(_last_line(each.folder))
                if found is not None:
                    listener.finished(each.job, found, time.monotonic() - each.started)
                else:
                    broken[each.job.folder] = _how(each)
                    listener.failed(each.job, broken[each.job.folder])
    finally:
        stop(active)


def _how(ended: Active) -> str:
    code = ended.worker.poll() or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"{ended.job.label} at {ended.job.rates} ended with {how} and no result ({_last_line(ended.folder)}); "
        "the same command tries it again."
    )


def stop(active: Sequence[Active], patience: float = PATIENCE_SECONDS) -> None:
    """Ask every worker to end with a checkpoint, and kill those that do not."""
    for each in active:
        each.worker.terminate()
    deadline = time.monotonic() + patience
    try:
        for each in active:
            each.worker.wait(max(0.0, deadline - time.monotonic()))
    except BaseException:  # patience is over, or there was a second Ctrl-C or SIGTERM
        for each in active:
            each.worker.kill()
            each.worker.wait()


def _last_line(folder: Path) -> str:
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else f"{folder / LOG} is empty"
