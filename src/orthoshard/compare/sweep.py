"""Which runs are still wanted, as a pure function of the runs that are done: so a killed comparison just asks again.

Every rival is tuned alike, on the first seed: learning rates middle x 2^k for ``points`` whole k around 0. While the
best one lies on the edge of those tried, the next one beyond that edge is tried too, until ``most`` have been. A run
that diverged is worse than any that did not. The other seeds run at the best learning rate only.
May import the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Spot = tuple[int, int]  # (k, seed): a run at middle x 2^k


@dataclass(frozen=True, slots=True)
class Sweep:
    """How every rival is tuned. ``points=1`` is no sweep: the middle alone."""

    points: int = 3
    most: int = 7
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class State:
    """Where one rival stands: what is still to run, and what is best among what has run."""

    missing: list[Spot]
    best: int | None
    """k of the best learning rate of the first seed; None while the sweep goes on, or where every run diverged."""
    at_edge: bool
    """The best is the outermost one tried, and ``most`` forbids to go on."""


def learning_rate(middle: float, k: int) -> float:
    return middle * 2.0**k


def state(sweep: Sweep, losses: Mapping[Spot, float]) -> State:
    """``losses`` of the runs that are done; infinite where they diverged."""
    first = sweep.seeds[0]
    low = -((sweep.points - 1) // 2)
    tried = list(range(low, low + sweep.points))
    while True:
        missing = [(k, first) for k in _middle_first(tried) if (k, first) not in losses]
        if missing:
            return State(missing, None, False)
        # Equal losses: the smaller learning rate. All diverged: every one is infinite, and the search goes down.
        best = min(tried, key=lambda k: (losses[k, first], k))
        beyond = best - 1 if best == tried[0] else best + 1 if best == tried[-1] else None
        if sweep.points == 1 or beyond is None or len(tried) >= sweep.most:
            break
        tried = sorted([*tried, beyond])
    edge = sweep.points > 1 and beyond is not None
    if math.isinf(losses[best, first]):
        return State([], None, edge)
    return State([(best, seed) for seed in sweep.seeds[1:] if (best, seed) not in losses], best, edge)


def at_least_left(sweep: Sweep, states: Sequence[State]) -> int:
    """How many runs there are still, if no grid has to be extended: for the time left."""
    more = len(sweep.seeds) - 1
    return sum(len(s.missing) + (more if s.best is None and s.missing else 0) for s in states)


def _middle_first(tried: Sequence[int]) -> list[int]:
    return sorted(tried, key=lambda k: (abs(k), k))
