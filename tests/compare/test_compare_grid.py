"""Which runs a sweep asks for, on losses with a known minimum."""

import math
import random

import pytest

from orthoshard.lab.compare.grid import Grid, Spot, at_least_left, learning_rate, state


def parabola(bottom: float, scalar_bottom: float = 0.0):
    return lambda k, j, seed: (k - bottom) ** 2 + (j - scalar_bottom) ** 2 + 0.1 * seed


def play(sweep: Grid, loss, one_at_a_time: bool = True):
    """Runs what is asked for until nothing is; returns the losses in the order they were run, and the last state."""
    losses: dict[Spot, float] = {}
    while (now := state(sweep, losses)).missing:
        for spot in now.missing[: 1 if one_at_a_time else None]:
            assert spot not in losses
            losses[spot] = loss(*spot)
    return losses, now


@pytest.mark.parametrize("one_at_a_time", [True, False])
@pytest.mark.parametrize(
    ("bottom", "tried"),
    [(0, [-1, 0, 1]), (1, [-1, 0, 1, 2]), (2.2, [-1, 0, 1, 2, 3]), (-3, [-4, -3, -2, -1, 0, 1]), (0.4, [-1, 0, 1])],
)
def test_each_grid_goes_on_until_its_best_has_neighbours(bottom, tried, one_at_a_time):
    best = min(tried, key=lambda k: (k - bottom) ** 2)
    losses, now = play(Grid(), parabola(bottom), one_at_a_time)
    assert sorted(k for k, j, _ in losses if j == 0) == tried
    assert sorted(j for k, j, _ in losses if k == best) == [-1, 0, 1]
    assert (now.best, now.at_edge, now.scalar_at_edge) == ((best, 0), False, False)
    losses, now = play(Grid(), parabola(0, bottom), one_at_a_time)
    assert sorted(k for k, j, _ in losses if j == 0) == [-1, 0, 1]
    assert sorted(j for k, j, _ in losses if k == 0) == tried
    assert (now.best, now.at_edge, now.scalar_at_edge) == ((0, best), False, False)


def test_the_second_grid_is_at_the_best_of_the_first_and_runs_nothing_twice():
    losses, now = play(Grid(), parabola(1, -1))
    assert list(losses) == [(0, 0, 0), (-1, 0, 0), (1, 0, 0), (2, 0, 0), (1, -1, 0), (1, 1, 0), (1, -2, 0)]
    assert now.best == (1, -1)


def test_the_middle_comes_first():
    assert [k for k, _, _ in state(Grid(points=5), {}).missing] == [0, -1, 1, -2, 2]
    assert [k for k, _, _ in state(Grid(points=4), {}).missing] == [0, -1, 1, 2]


def test_most_ends_a_grid_and_the_edge_is_said():
    losses, now = play(Grid(most=5), parabola(9, 9))
    assert sorted(k for k, j, _ in losses if j == 0) == [-1, 0, 1, 2, 3]
    assert (now.best, now.at_edge, now.scalar_at_edge) == ((3, 3), True, True)


def test_one_point_is_no_grid():
    losses, now = play(Grid(points=1, scalar_points=1), parabola(5, 5))
    assert list(losses) == [(0, 0, 0)]
    assert (now.best, now.at_edge, now.scalar_at_edge) == ((0, 0), False, False)
    losses, now = play(Grid(points=1), parabola(5, 0))
    assert list(losses) == [(0, 0, 0), (0, -1, 0), (0, 1, 0)]


def test_a_run_that_diverged_is_worse_than_any_other():
    losses, now = play(Grid(), lambda k, j, seed: math.inf if k > -2 or (j > -1 and k != -3) else 5.0 + k + j)
    assert now.best is not None
    assert math.isfinite(losses[Spot(*now.best, 0)])


def test_where_all_diverge_lower_rates_are_tried_and_there_is_no_best():
    losses, now = play(Grid(most=5), lambda k, j, seed: math.inf)
    assert sorted(k for k, _, _ in losses) == [-3, -2, -1, 0, 1]
    assert now.best is None
    assert not now.missing


def test_other_seeds_run_at_the_best_pair_only():
    losses, now = play(Grid(seeds=(3, 1, 2)), parabola(1, 1))
    assert [spot for spot in losses if spot.seed != 3] == [(1, 1, 1), (1, 1, 2)]
    assert now.best == (1, 1)


def test_a_sweep_ends_alike_whatever_was_run_before():
    """Also runs that no sweep would ask for, left by other settings, change nothing."""
    sweep, loss = Grid(seeds=(0, 1)), parabola(2.2, -1.2)
    wanted, last = play(sweep, loss)
    spots = [Spot(k, j, seed) for k in range(-7, 8) for j in range(-7, 8) for seed in (0, 1)]
    draw = random.Random(0)
    for _ in range(30):
        losses = {spot: loss(*spot) for spot in draw.sample(spots, draw.randrange(len(spots)))}
        already = set(losses)
        while (now := state(sweep, losses)).missing:
            spot = now.missing[0]
            assert spot in wanted
            losses[spot] = loss(*spot)
        assert now == last
        assert set(wanted) <= already | set(losses)


def test_a_grid_doubles():
    assert [learning_rate(0.01, k) for k in (-1, 0, 2)] == [0.005, 0.01, 0.04]


def test_runs_left_counts_the_second_grid_and_the_seeds_to_come():
    sweep = Grid(seeds=(0, 1, 2))
    assert at_least_left([state(sweep, {})]) == 3 + 2 + 2
    first = {Spot(k, 0, 0): float(k * k) for k in (-1, 0, 1)}
    assert at_least_left([state(sweep, first)]) == 2 + 2
    both = first | {Spot(0, j, 0): float(j * j) for j in (-1, 1)}
    assert at_least_left([state(sweep, both)]) == 2
    assert at_least_left([state(sweep, both | {Spot(0, 0, 1): 0.0, Spot(0, 0, 2): 0.0})]) == 0
