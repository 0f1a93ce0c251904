"""The processor time that other processes took during a measurement (Linux only). May import the standard library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
# proc(5): user, nice, system, idle, iowait, irq, softirq, steal, in ticks; guests are within user and nice
TIMES, IDLE = 8, (3, 4)


def others_since() -> Callable[[], float | None]:
    """Return a function that returns the share of all processors' time, since this call, that other processes used.

    Time of this process and its ended children does not count. The share is None if the system does not report it.
    """
    before, ours = _ticks(), _ours()

    def share() -> float | None:
        after = _ticks()
        if before is None or after is None:
            return None
        spent = [late - early for early, late in zip(before, after, strict=True)]
        there = sum(spent)
        busy = there - sum(spent[i] for i in IDLE)
        return max((busy - (_ours() - ours)) / there, 0.0) if there > 0 else None

    return share


def _ours() -> float:
    return sum(os.times()[:4])


def _ticks() -> list[float] | None:
    """Return the seconds of all processors together, by kind of use, or None if the system does not report them."""
    try:
        return [
            int(field) / os.sysconf("SC_CLK_TCK") for field in STAT.read_text(encoding="utf-8").split()[1 : 1 + TIMES]
        ]
    except OSError:
        return None
