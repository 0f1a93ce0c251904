"""One check is one row: a figure that may be no more than a limit, or an exception, which fails, or a reason to skip.

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
        result, reason = "FAIL", reason_of(error)
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
        yield Row(name, "the section itself", "FAIL", None, None, reason_of(error), 0.0)


def reason_of(error: BaseException) -> str:
    """What ``error`` says first, with its type where it is not a sentence of our own."""
    first, kind = first_line(error), type(error).__name__
    return first if first == kind or isinstance(error, AssertionError) else f"{kind}: {first}"
