"""Runs that take no time: their loss is a parabola in log2 of each learning rate, with its bottom at a known place."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.job import Outcome

# best lr, best scalar_lr, and the loss there
BOTTOM = {"adamw": (3e-3, 0.012, 4.25), "muon": (0.02, 0.024, 3.75), "dion": (0.04, 0.012, 3.8)}
HIGHEST = 0.5  # learning rates above diverge


def make_outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "label": "adamw",
        "lr": 0.1,
        "k": 0,
        "seed": 0,
        "status": "finished",
        "steps": 4,
        "validations": [(0, 7.0), (2, 5.0), (4, 4.0)],
        "train": [(1, 6.5), (2, 5.5), (3, 4.8), (4, 4.2)],
        "elapsed": [0.0, 2.0, 3.0, 4.0, 5.0],
        "optimizer_ms": 10.0,
        "step_ms": 100.0,
        "state_bytes": 1000,
        "wall_seconds": 7.0,
        "digest": "d",
        "machine": {"device": "cpu", "threads": 2},
        "versions": {"torch": "2.13.0"},
        "scalar_lr": 0.012,
        "j": 0,
    }
    return Outcome(**(values | changes))


def fake_loss(config: dict[str, Any]) -> float:
    optimizer = config["optimizer"]
    lr, scalar_lr, least = BOTTOM[optimizer["name"]]
    if optimizer["lr"] > HIGHEST:
        return math.inf
    away = math.log2(optimizer["lr"] / lr) ** 2 + math.log2(optimizer["scalar_lr"] / scalar_lr) ** 2
    return least + 0.05 * away + 0.01 * config["seed"]


def write_result(folder: Path, digest: str = "d") -> None:
    """What a worker leaves behind."""
    given = json.loads((folder / jobs.SETTINGS).read_text())
    loss, (k, j, seed) = fake_loss(given["config"]), given["spot"]
    found = make_outcome(
        label=given["label"],
        lr=given["config"]["optimizer"]["lr"],
        scalar_lr=given["config"]["optimizer"]["scalar_lr"],
        k=k,
        j=j,
        seed=seed,
        status="finished" if math.isfinite(loss) else "diverged",
        validations=[(0, 7.0), (2, loss + 1), (4, loss)],
        digest=digest,
    )
    jobs.save(folder / jobs.RESULT, found)


class FakeWorker:
    """Ends with ``code`` after it was asked ``polls`` times; a good end leaves a result."""

    def __init__(self, folder: Path, code: int, polls: int, finish: Callable[[Path], None]) -> None:
        self.folder, self.code, self.left, self.finish = folder, code, polls, finish
        self.ended: int | None = None
        self.terminated = self.killed = False

    def poll(self) -> int | None:
        self.left -= 1
        if self.ended is None and self.left < 0:
            self.ended = self.code
            if self.code == 0:
                self.finish(self.folder)
        return self.ended

    def terminate(self) -> None:
        self.terminated = True
        self.ended = -signal.SIGTERM if self.ended is None else self.ended

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        assert self.ended is not None
        return self.ended


class FakeStart:
    """Starts fake workers, and remembers them. ``codes`` gives exit codes by run folder; others end well."""

    def __init__(
        self, codes: dict[str, int] | None = None, polls: int = 1, finish: Callable[[Path], None] = write_result
    ) -> None:
        self.codes, self.polls, self.finish = codes or {}, polls, finish
        self.workers: list[FakeWorker] = []
        self.most_at_once = 0

    @property
    def runs(self) -> list[str]:
        return [worker.folder.name for worker in self.workers]

    def __call__(self, folder: Path, keep_open: Sequence[int]) -> FakeWorker:
        code = next((code for start, code in self.codes.items() if folder.name.startswith(start)), 0)
        worker = FakeWorker(folder, code, self.polls, self.finish)
        self.workers.append(worker)
        self.most_at_once = max(self.most_at_once, sum(w.ended is None for w in self.workers))
        return worker
