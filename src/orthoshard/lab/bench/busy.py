"""How much of the processors others took while something was timed. Linux says; may import the standard library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
# proc(5): user, nice, system, idle, iowait, irq, softirq, steal, in ticks; guests are within user and nice
TIMES, IDLE = 8, (3, 4)


def others_since() -> Callable[[], float | None]:
    """Asked later, the share of all processors' time since now that was neither idle nor used by this process and its
    children that have ended; None where the system does not tell."""
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
    """Seconds of all processors together, by what they did."""
    try:
        return [
            int(field) / os.sysconf("SC_CLK_TCK") for field in STAT.read_text(encoding="utf-8").split()[1 : 1 + TIMES]
        ]
    except OSError:
        return None
