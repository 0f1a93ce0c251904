"""The runs that are still missing, as a pure function of the finished ones: a killed comparison just asks again.

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
    """How every rival is tuned. With ``points=1`` or ``scalar_points=1`` that rate has no grid, only its middle."""

    points: int = 3
    most: int = 7
    seeds: tuple[int, ...] = (0,)
    scalar_points: int = 3


@dataclass(frozen=True, slots=True)
class State:
    """The state of one rival: its missing runs, and the best of the finished ones."""

    missing: list[Spot]
    best: tuple[int, int] | None
    """(k, j) of the best rates on the first seed; None while a grid is unfinished, or if every run diverged."""
    at_edge: bool = False
    """Whether the best lr is the outermost one tried, and ``most`` allows no further one."""
    scalar_at_edge: bool = False
    later: int = 0
    """The number of runs that will follow the missing ones in any case."""


def learning_rate(middle: float, k: int) -> float:
    return middle * 2.0**k


def state(grid: Grid, losses: Mapping[Spot, float]) -> State:
    """Return the state of a rival. ``losses`` are those of its finished runs, infinite if diverged."""
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
    """Return how many runs are left if no grid has to be extended, to estimate the time left."""
    return sum(len(state.missing) + state.later for state in states)


def _grid(points: int, most: int, losses: Mapping[int, float]) -> tuple[list[int], int | None, bool]:
    """Return the missing exponents, the best one once none is missing (None if all diverged), and whether it is at the
    edge."""
    low = -((points - 1) // 2)
    tried = list(range(low, low + points))
    while True:
        missing = [k for k in sorted(tried, key=lambda k: (abs(k), k)) if k not in losses]
        if missing:
            return missing, None, False
        # Of equal losses the smaller rate is best. If all diverged, all are infinite, and the search goes down.
        best = min(tried, key=lambda k: (losses[k], k))
        beyond = best - 1 if best == tried[0] else best + 1 if best == tried[-1] else None
        if points == 1 or beyond is None or len(tried) >= most:
            break
        tried = sorted([*tried, beyond])
    return [], None if math.isinf(losses[best]) else best, points > 1 and beyond is not None
