"""run.jsonl, the record of a run: one JSON object per line, append-only. All displays and plots are made from it.

    {"kind": "run",        "config", "versions", "machine", "parameters", "trained", "data", ...}    first line
    {"kind": "step",       "step", "loss", "lr", "grad_norm", "seconds", "optimizer_seconds", "tokens", "skipped"}
    {"kind": "validation", "step", "loss"}
    {"kind": "diagnostics", "step", "groups", "parameters"}     with --diagnostics, see `figures`
    {"kind": "checkpoint", "step", "folder", "seconds"}
    {"kind": "stopped" | "finished", "step", "time", "state_bytes": of the optimizer}
    {"kind": "resumed",    "step", "lacking": earlier steps that are missing in the record, ...}

`step` counts finished steps. A number that is not finite is null. Such a line is an *event*: displays, TensorBoard and
`compare` are functions of events. If the process is killed, the last line may be incomplete, and there may be steps
after the last checkpoint. Resuming from a checkpoint removes the lines after its step, and no others.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from orthoshard.lab.train.errors import UserError, disk_errors

NAME = "run.jsonl"
Event = dict[str, Any]
Sink = Callable[[Event], None]


class Record:
    """The open file, which is also the lock of the run: held until it is closed or the process ends.

    With ``new``, the file must not exist yet; its folder may. Raises ``UserError`` if another process holds the lock,
    or if the system refuses a write.
    """

    def __init__(self, folder: Path, *, new: bool) -> None:
        self.path = folder / NAME
        with disk_errors(folder, "give another folder with --out."):
            try:
                if new:
                    folder.mkdir(parents=True, exist_ok=True)
                    self.path.touch(exist_ok=False)
                # Unbuffered: each line is one write, so if the process is killed at most the last line is incomplete.
                self._file: IO[bytes] = self.path.open("ab", buffering=0)
                _lock(self._file)
            except BlockingIOError as error:
                self._file.close()
                raise UserError(f"another process trains in {folder}; wait for it, or give another --out.") from error
            except FileExistsError as error:
                raise UserError(
                    f"{folder} already holds a run; go on with it by --resume, or give another folder with --out."
                ) from error

    def __call__(self, event: Event) -> None:
        line = json.dumps({key: _finite(value) for key, value in event.items()}, allow_nan=False)
        raw = memoryview(line.encode() + b"\n")
        with self._written():
            while raw:
                raw = raw[self._file.write(raw) :]

    def sync(self) -> None:
        """Flush to disk. Called before a checkpoint, so that no checkpoint is ahead of the record."""
        with self._written():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _written(self) -> AbstractContextManager[None]:
        return disk_errors(
            self.path.parent, "make room there; the last checkpoint is kept, and --resume goes on from it."
        )


def read(folder: Path) -> list[Event]:
    """Return the events of a run, without an incomplete last line. Raises ``UserError`` if the file is not a record."""
    return [event for event, _ in _lines(folder / NAME)]


def cut(folder: Path, step: int) -> list[Event]:
    """Remove all events after ``step`` from the file, and return the events that remain."""
    path = folder / NAME
    kept: list[Event] = []
    end = 0
    for event, after in _lines(path):
        if event.get("step", 0) > step:
            break
        kept.append(event)
        end = after
    if path.exists() and path.stat().st_size > end:
        os.truncate(path, end)
    return kept


def validations(events: Iterable[Event]) -> list[tuple[int, float]]:
    """Return pairs (step, nats per token), in order. A loss that was not finite is infinity here."""
    rows = [event for event in events if event["kind"] == "validation"]
    return [(row["step"], math.inf if row["loss"] is None else row["loss"]) for row in rows]


def seconds(events: Iterable[Event], of: str = "seconds") -> float:
    """Return the seconds of all steps together, without validation and checkpoints.

    With ``of="optimizer_seconds"``, return those spent in the optimizer.
    """
    return sum(event[of] for event in events if event["kind"] == "step")


def _lines(path: Path) -> list[tuple[Event, int]]:
    """Return each event with the offset of the end of its line."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    events: list[tuple[Event, int]] = []
    offset = 0
    for number, line in enumerate(raw.split(b"\n")[:-1], start=1):  # after the last newline: incomplete or empty
        offset += len(line) + 1
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            if offset == len(raw):  # after a power failure the last line may be zeros
                break
            raise UserError(f"line {number} of {path} is not JSON; this is not a record of a run, or it was edited.")
        events.append((event, offset))
    return events


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise
        # else the file system does not support locks: no lock


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
