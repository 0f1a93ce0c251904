"""One run in a process of its own: ``python -m orthoshard.lab.compare.worker FOLDER PARENT`` does FOLDER/job.json.

A separate process returns its memory, and it can be killed or fail without ending the comparison. A run that was begun
before continues from its last checkpoint. On SIGINT or SIGTERM, or if the process with the number PARENT is gone, it
stops after the step, with a checkpoint. Under torchrun each rank has such a process, and that of rank 0 writes the
result (see `orthoshard.lab.compare.torchrun_workers`).

Exit codes: 0 there is a result, 2 the user has to put something right (one sentence on stderr), 3 stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.job import Job
from orthoshard.lab.compare.pool import REFUSED
from orthoshard.lab.train import record
from orthoshard.lab.train.config import TrainConfig, from_dict
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import LAST, train
from orthoshard.lab.train.record import Event
from orthoshard.lab.train.torchrun import Torchrun, started_by_torchrun

DONE, STOPPED = 0, 3


def main(folder: Path, parent: int) -> int:
    """Run, or continue, the job in ``folder``."""
    values = json.loads((folder / jobs.SETTINGS).read_text(encoding="utf-8"))
    config = from_dict(TrainConfig(), values["config"], str(folder / jobs.SETTINGS))
    job = Job(values["label"], Spot(*values["spot"]), config)
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    begun = (folder / record.NAME).is_file()
    started = time.monotonic()
    torchrun = Torchrun.enter(config.machine.timeout) if started_by_torchrun() else None
    speaks = torchrun is None or torchrun.rank == 0
    try:
        result = train(
            config,
            folder,
            resume=LAST if begun else None,
            stop=lambda: bool(caught) or os.getppid() != parent,
        )
        if result.status == "stopped":
            return STOPPED
        status, events = result.status, result.events
        if torchrun is not None:
            torchrun.done()
    except UserError as error:
        if not speaks:
            return REFUSED
        events = record.read(folder) if (folder / record.NAME).is_file() else []
        if not gave_up(events, config.max_skipped):
            print(error, file=sys.stderr)
            return REFUSED
        status = "diverged"
    if not speaks:
        return DONE
    jobs.save(folder / jobs.RESULT, jobs.outcome(job, status, events, time.monotonic() - started))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # dozens of runs would fill a disk
    return DONE


def gave_up(events: list[Event], max_skipped: int) -> bool:
    """Return whether the run ended because too many gradients in a row were not finite."""
    row = 0
    for event in events:
        if event["kind"] == "step":
            row = row + 1 if event["skipped"] else 0
    return row > max_skipped


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2])))
