"""One check is one row: a figure that may be no more than a limit, or an exception, which fails, or a reason to skip.

May import the standard library.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal


class NotHere(Exception):
    """A check that this machine or this process cannot make, and why."""


@dataclass(frozen=True)
class Check:
    """``measure`` returns a figure, its limit and, where it fails, maybe a reason. It may raise `NotHere`; what else
    it raises is a failure."""

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
        """JSON has no NaN and no infinity: they are words there."""
        finite = {
            key: value if value is None or math.isfinite(value) else str(value)
            for key, value in (("figure", self.figure), ("limit", self.limit))
        }
        return {**asdict(self), **finite}


def absent(what: str, why: str) -> Check:
    """A check that is skipped."""

    def measure() -> tuple[float, float]:
        raise NotHere(why)

    return Check(what, measure)


def run_check(section: str, check: Check) -> Row:
    figure = limit = None
    began, reason = time.perf_counter(), ""
    try:
        figure, limit, *why = check.measure()
        result = "ok" if figure <= limit else "FAIL"  # NaN fails
        reason = "".join(why)
    except NotHere as why:
        result, reason = "skipped", str(why)
    except Exception as error:  # whatever it is, the other checks go on
        result, reason = "FAIL", first_line(error)
    return Row(section, check.what, result, figure, limit, reason, round(time.perf_counter() - began, 3))


def run_section(
    name: str, checks: Callable[[], Iterable[Check]], begins: Callable[[str, str], object]
) -> Iterator[Row]:
    """Every check of a section, one after the other; ``begins`` hears section and check before it is made. Where the
    section itself ends with an exception, a row says so."""
    try:
        for check in checks():
            begins(name, check.what)
            yield run_check(name, check)
    except Exception as error:
        begins(name, "the section itself")
        yield Row(name, "the section itself", "FAIL", None, None, first_line(error), 0.0)


def first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, AssertionError) and text:  # our own sentence
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
