"""What every verb does alike: reads its flags, and ends with a sentence and an exit code. May import tyro.

0 done, 1 something broke, 2 something to put right, 130 and 143 stopped by Ctrl-C and SIGTERM.
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

WIDTH = 120  # of a table where there is no terminal to ask
Flags = TypeVar("Flags")

# tyro breaks a flag's text wherever its source breaks the line: it takes the indent of the next one for a layout. A
# tyro that has no such function breaks lines where it likes.
_strings: Any = getattr(tyro, "_docstrings", None)
_parse: Any = getattr(_strings, "parse_docstring_from_object", None)
if _parse is not None:
    _strings.parse_docstring_from_object = lambda kind: {
        name: " ".join(text.split()) for name, text in _parse(kind).items()
    }


def read_flags(kind: type[Flags], prog: str, arguments: Sequence[str] | None, default: Flags | None = None) -> Flags:
    """The flags as a ``kind``, over ``default``. What is wrong with them is one sentence, and exit code 2."""
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
    """The first part of tyro's box, and the flags that it thinks were meant. Its frame is of ASCII where stdout is."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # colours
    lines = [line.strip(" │") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [part.split("\n") for part in re.split(r"^[─-]+$", "\n".join(lines), flags=re.MULTILINE)]
    what, *more = parts if "╭" in box else parts[1:]
    flags = [match[0] for part in more for line in part if (match := re.match(r"--[\w-]+", line))]
    text = " ".join(filter(None, what)).rstrip(".")
    # Of a flag that may be left out tyro says first that it is not None, and what it made the rest of.
    text = re.sub(r": no type matching .*(?:\)\]|'>): ", ": ", text)
    meant = f"; did you mean {' or '.join(dict.fromkeys(flags))}" if flags and text.startswith("Unrec") else ""
    return text[:1].lower() + text[1:] + meant


def exit_code(verb: str, work: Callable[[], int | None], resumes: bool = False) -> int:
    """What ``work`` returns, or the code of what ended it, said in one sentence. ``resumes``: the same command goes on
    where it was stopped."""
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
