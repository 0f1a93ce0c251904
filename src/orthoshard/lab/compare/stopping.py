"""What ends a command early, as a sentence on stderr and an exit code. May import ``orthoshard.lab.train.errors``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn

from orthoshard.lab.train.errors import UserError


def exit_code(verb: str, work: Callable[[], int]) -> int:
    """What ``work`` returns; 2 for something to put right, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        with _terminable():
            return work()
    except (UserError, ValueError) as error:
        print(f"orthoshard {verb}: {error}", file=sys.stderr)
        return 2
    except _Terminated:
        return 143
    except KeyboardInterrupt:
        print(f"orthoshard {verb}: stopped; the same command goes on.", file=sys.stderr)
        return 130


class _Terminated(Exception):
    """SIGTERM came."""


@contextmanager
def _terminable() -> Generator[None]:
    """SIGTERM ends the command like Ctrl-C does: with the runs at work stopped at a checkpoint."""

    def end(*_: object) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
