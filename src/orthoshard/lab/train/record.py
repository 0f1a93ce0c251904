"""run.jsonl, the record of a run: one JSON object a line, only ever appended to. What is shown elsewhere comes from it.

    {"kind": "run",        "config", "versions", "machine", "parameters", "trained", "data", ...}    first line
    {"kind": "step",       "step", "loss", "lr", "grad_norm", "seconds", "optimizer_seconds", "tokens", "skipped"}
    {"kind": "validation", "step", "loss"}
    {"kind": "diagnostics", "step", "groups", "parameters"}     with --diagnostics, see `figures`
    {"kind": "checkpoint", "step", "folder", "seconds"}
    {"kind": "resumed" | "stopped" | "finished", "step", ...}     finished: also "state_bytes", the optimizer's;
                  resumed: also "lacking", the steps before it that the record has lost

`step` counts finished steps. A number that is not finite is null. Such a line is an *event*: displays, TensorBoard and
`compare` are functions of events. A kill may tear the last line and leave steps that no checkpoint knows; resuming from
a checkpoint cuts the file behind that checkpoint's step, and nowhere before it.
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
    """The open file; a ``new`` one must not be there yet, its folder may be. It is also the run's lock: held until it
    is closed, and gone with the process. Raises ``UserError`` where another holds it, or the system refuses a write."""

    def __init__(self, folder: Path, *, new: bool) -> None:
        self.path = folder / NAME
        with disk_errors(folder, "give another folder with --out."):
            try:
                if new:
                    folder.mkdir(parents=True, exist_ok=True)
                    self.path.touch(exist_ok=False)
                # Unbuffered, a line is one write: a kill tears at most the last.
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
        """Everything so far reaches the disk: called before a checkpoint, which must not know more than the record."""
        with self._written():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _written(self) -> AbstractContextManager[None]:
        return disk_errors(
            self.path.parent, "make room there; the last checkpoint is kept, and --resume goes on from it."
        )


def read(folder: Path) -> list[Event]:
    """The events of a run, without a torn last line. Raises ``UserError`` for a file that is no record."""
    return [event for event, _ in _lines(folder / NAME)]


def cut(folder: Path, step: int) -> list[Event]:
    """Remove what came after ``step``, and return the events that stay."""
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
    """(step, nats a token), in order; a loss that was not finite counts as infinite."""
    rows = [event for event in events if event["kind"] == "validation"]
    return [(row["step"], math.inf if row["loss"] is None else row["loss"]) for row in rows]


def seconds(events: Iterable[Event], of: str = "seconds") -> float:
    """Of all steps together, without validation and checkpoints; ``of="optimizer_seconds"``: in the optimizer."""
    return sum(event[of] for event in events if event["kind"] == "step")


def _lines(path: Path) -> list[tuple[Event, int]]:
    """Each event with the offset behind its line."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    events: list[tuple[Event, int]] = []
    offset = 0
    for number, line in enumerate(raw.split(b"\n")[:-1], start=1):  # what follows the last newline is torn, or nothing
        offset += len(line) + 1
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            if offset == len(raw):  # a machine that lost power may leave a last line of zeros
                break
            raise UserError(f"line {number} of {path} is not JSON; this is not a record of a run, or it was edited.")
        events.append((event, offset))
    return events


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: without this protection
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise
        # else a file system without locks: without this protection


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
