"""What all verbs share: reading flags, and ending with one sentence and an exit code. May import tyro.

Exit codes: 0 done, 1 something broke, 2 a mistake that the user can correct, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NoReturn, TypeVar

import tyro

from orthoshard.lab.train.errors import UserError

WIDTH = 120  # of a table, in characters, if there is no terminal
Flags = TypeVar("Flags")

# tyro breaks the help text of a flag wherever the source breaks the line, because it reads the indent of the next line
# as layout. So line breaks are removed. A tyro without this private function keeps its own line breaks.
_strings: Any = getattr(tyro, "_docstrings", None)
_parse: Any = getattr(_strings, "parse_docstring_from_object", None)
if _parse is not None:
    _strings.parse_docstring_from_object = lambda kind: {
        name: " ".join(text.split()) for name, text in _parse(kind).items()
    }


def read_flags(kind: type[Flags], prog: str, arguments: Sequence[str] | None, default: Flags | None = None) -> Flags:
    """Return the flags as a ``kind``, on top of ``default``. On a mistake, print one sentence and exit with code 2."""
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    given = list(sys.argv[1:] if arguments is None else arguments)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, prog=prog, args=given, config=settings)
            return tyro.cli(kind, prog=prog, args=given, default=default, config=settings)
    except SystemExit as end:
        if end.code:
            print(f"{prog}: {_sentence(said.getvalue())}; see {prog} --help.", file=sys.stderr)
        raise


def _sentence(box: str) -> str:
    """Return the first part of tyro's error box and the flags that tyro suggests, as one sentence.

    The frame of the box is ASCII if stdout is.
    """
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # colours
    lines = [line.strip(" │") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [part.split("\n") for part in re.split(r"^[─-]+$", "\n".join(lines), flags=re.MULTILINE)]
    what, *more = parts if "╭" in box else parts[1:]
    flags = [match[0] for part in more for line in part if (match := re.match(r"--[\w-]+", line))]
    text = " ".join(filter(None, what)).rstrip(".")
    # For an optional flag tyro says first that the value is not None. That part is cut out.
    text = re.sub(r": no type matching .*(?:\)\]|'>): ", ": ", text)
    meant = f"; did you mean {' or '.join(dict.fromkeys(flags))}" if flags and text.startswith("Unrec") else ""
    return text[:1].lower() + text[1:] + meant


def exit_code(verb: str, work: Callable[[], int | None], resumes: bool = False) -> int:
    """Run ``work`` and return its exit code. If an error ends it, print one sentence and return the code of the error.

    ``resumes``: if the same command is given again after Ctrl-C, it continues.
    """
    try:
        with _terminable():
            return work() or 0
    except (UserError, ValueError) as error:
        print(f"orthoshard {verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = error.filename or "a file"
        print(f"orthoshard {verb}: {where} cannot be used ({error.strerror or error}).", file=sys.stderr)
        return 2
    except _Terminated:
        return 143
    except KeyboardInterrupt:
        print(f"orthoshard {verb}: stopped{'; the same command goes on' if resumes else ''}.", file=sys.stderr)
        return 130


class _Terminated(Exception):
    """Raised when SIGTERM arrives."""


@contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM end the command as Ctrl-C does: runs in progress stop with a checkpoint."""

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
