"""Checks and their rows: a figure that must not exceed a limit, an exception, which is a failure, or a reason to skip.

May import the standard library and `orthoshard.lab.train.errors`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orthoshard.lab.train.errors import first_line


class NotHere(Exception):
    """This machine or this process cannot make a check. The message says why."""


@dataclass(frozen=True)
class Check:
    """A check ``what``: ``measure`` returns a figure, its limit and perhaps a reason for a failure.

    If it raises `NotHere` the check is skipped. Any other exception is a failure.
    """

    what: str
    measure: Callable[[], tuple[float, float] | tuple[float, float, str]]


@dataclass(frozen=True)
class Row:
    section: str
    what: str
    result: Literal["ok", "FAIL", "skipped"]
    figure: float | None
    limit: float | None
    reason: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the row as a dict for JSON, with NaN and infinity as words."""
        finite = {
            key: value if value is None or math.isfinite(value) else str(value)
            for key, value in (("figure", self.figure), ("limit", self.limit))
        }
        return {**asdict(self), **finite}


def absent(what: str, why: str) -> Check:
    """Return a check that is skipped."""

    def measure() -> tuple[float, float]:
        raise NotHere(why)

    return Check(what, measure)


def run_check(section: str, check: Check) -> Row:
    """Make a check and return its row."""
    figure = limit = None
    began, reason = time.perf_counter(), ""
    try:
        figure, limit, *why = check.measure()
        result = "ok" if figure <= limit else "FAIL"  # NaN fails
        reason = "".join(why)
    except NotHere as why:
        result, reason = "skipped", str(why)
    except Exception as error:  # any failure, so that the other checks still run
        result, reason = "FAIL", reason_of(error)
    return Row(section, check.what, result, figure, limit, reason, round(time.perf_counter() - began, 3))


def run_section(
    name: str, checks: Callable[[], Iterable[Check]], begins: Callable[[str, str], object]
) -> Iterator[Row]:
    """Make the checks of a section one after the other, and yield their rows.

    ``begins`` is called with section and check before each. If the section itself raises, a row says so.
    """
    try:
        for check in checks():
            begins(name, check.what)
            yield run_check(name, check)
    except Exception as error:
        begins(name, "the section itself")
        yield Row(name, "the section itself", "FAIL", None, None, reason_of(error), 0.0)


def reason_of(error: BaseException) -> str:
    """Return the first line of ``error``, after its type unless it is one of our own AssertionErrors."""
    first, kind = first_line(error), type(error).__name__
    return first if first == kind or isinstance(error, AssertionError) else f"{kind}: {first}"
