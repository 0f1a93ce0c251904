"""Which runs are still wanted, as a pure function of the runs that are done: so a killed comparison just asks again.

Every rival is tuned alike, on the first seed, in two grids one after the other:

    1. the rate of its matrices:    lr = middle x 2^k for ``points`` whole k around 0, at the middle of the other rate
    2. the rate of all else:        scalar_lr = middle x 2^j for ``scalar_points`` whole j around 0, at the best k

While the best of a grid lies on its edge, the next rate beyond that edge is tried too, until ``most`` have been. A run
that diverged is worse than any that did not. The other seeds run at the best pair only.
May import the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Spot(NamedTuple):
    """A run at lr = middle x 2^k and scalar_lr = middle x 2^j."""

    k: int
    j: int
    seed: int


@dataclass(frozen=True, slots=True)
class Grid:
    """How every rival is tuned. ``points=1`` or ``scalar_points=1`` is no grid: that rate's middle alone."""

    points: int = 3
    most: int = 7
    seeds: tuple[int, ...] = (0,)
    scalar_points: int = 3


@dataclass(frozen=True, slots=True)
class State:
    """Where one rival stands: what is still to run, and what is best among what has run."""

    missing: list[Spot]
    best: tuple[int, int] | None
    """(k, j) of the best rates of the first seed; None while a grid goes on, or where every run diverged."""
    at_edge: bool = False
    """The best lr is the outermost one tried, and ``most`` forbids to go on."""
    scalar_at_edge: bool = False
    later: int = 0
    """Runs that follow the missing ones in any case."""


def learning_rate(middle: float, k: int) -> float:
    return middle * 2.0**k


def state(grid: Grid, losses: Mapping[Spot, float]) -> State:
    """``losses`` of the runs that are done; infinite where they diverged."""
    first, others = grid.seeds[0], grid.seeds[1:]
    missing, k, at_edge = _grid(grid.points, grid.most, {s.k: x for s, x in losses.items() if s[1:] == (0, first)})
    if missing:
        return State([Spot(k, 0, first) for k in missing], None, later=grid.scalar_points - 1 + len(others))
    if k is None:
        return State([], None, at_edge)
    scalars = {s.j: x for s, x in losses.items() if (s.k, s.seed) == (k, first)}
    missing, j, scalar_at_edge = _grid(grid.scalar_points, grid.most, scalars)
    if missing:
        return State([Spot(k, j, first) for j in missing], None, at_edge, later=len(others))
    assert j is not None, "the run in the middle did not diverge"
    left = [spot for seed in others if (spot := Spot(k, j, seed)) not in losses]
    return State(left, (k, j), at_edge, scalar_at_edge)


def at_least_left(states: Sequence[State]) -> int:
    """How many runs there are still, if no grid has to be extended: for the time left."""
    return sum(len(state.missing) + state.later for state in states)


def _grid(points: int, most: int, losses: Mapping[int, float]) -> tuple[list[int], int | None, bool]:
    """The exponents that are missing; or else the best one, None where all diverged, and whether it is at the edge."""
    low = -((points - 1) // 2)
    tried = list(range(low, low + points))
    while True:
        missing = [k for k in sorted(tried, key=lambda k: (abs(k), k)) if k not in losses]
        if missing:
            return missing, None, False
        # Equal losses: the smaller learning rate. All diverged: every one is infinite, and the search goes down.
        best = min(tried, key=lambda k: (losses[k], k))
        beyond = best - 1 if best == tried[0] else best + 1 if best == tried[-1] else None
        if points == 1 or beyond is None or len(tried) >= most:
            break
        tried = sorted([*tried, beyond])
    return [], None if math.isinf(losses[best]) else best, points > 1 and beyond is not None
