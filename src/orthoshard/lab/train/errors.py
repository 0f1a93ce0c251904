"""``UserError``: a mistake that the user can correct, in one sentence. The command line prints it and exits with 2."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from orthoshard.spelling import did_you_mean


class UserError(Exception):
    """One sentence that says what is wrong and what to do about it."""


def unknown(kind: str, name: str, known: Iterable[str], also: str = "") -> UserError:
    """Return the error for an unknown name. It gives the most similar known name, then all known names."""
    names = sorted(known)
    rest = f", or {also}" if also else ""
    return UserError(f"there is no {kind} {name!r}{did_you_mean(name, names, 0.5)} Known: {', '.join(names)}{rest}.")


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or the name of its type if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def disk_errors(path: Path, advice: str) -> Generator[None]:
    """Turn every ``OSError`` raised in this context into a ``UserError`` about ``path``, with ``advice``."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, advice) or error from error


def disk_error(error: BaseException, path: Path, advice: str) -> UserError | None:
    """Return the error for a write that the system refused, or None if ``error`` has another cause.

    Libraries wrap errors of the system, so the whole chain of causes is searched.
    """
    system = _system_error(error)
    if system is None:
        return None
    if system.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"the disk that holds {path} is full"
    elif system.errno == errno.EFBIG:
        what = f"a file under {path} would grow beyond the size allowed here (see `ulimit -f`)"
    elif system.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"{path} cannot be written to (permission denied, or a read-only disk)"
    else:
        what = f"writing under {path} failed ({system.strerror or system})"
    return UserError(f"{what}; {advice}")


def _system_error(error: BaseException) -> OSError | None:
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        current = queue.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError):
            return current
        queue += [current.__cause__, current.__context__]
        failures: object = getattr(current, "failures", None)  # of torch's CheckpointException: rank -> error
        if isinstance(failures, dict):
            queue += [part[0] if isinstance(part, tuple) and part else part for part in failures.values()]
    return None
