"""Which runs a sweep asks for, on losses with a known minimum."""

import math
import random

import pytest

from orthoshard.compare.sweep import Sweep, at_least_left, learning_rate, state


def parabola(bottom: float):
    return lambda k, seed: (k - bottom) ** 2 + 0.1 * seed


def play(sweep: Sweep, loss, one_at_a_time: bool = True):
    """Runs what is asked for until nothing is; returns the losses in the order they were run, and the last state."""
    losses: dict[tuple[int, int], float] = {}
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
def test_a_sweep_goes_on_until_its_best_has_neighbours(bottom, tried, one_at_a_time):
    losses, now = play(Sweep(), parabola(bottom), one_at_a_time)
    assert sorted(k for k, _ in losses) == tried
    assert now.best == min(tried, key=lambda k: (k - bottom) ** 2)
    assert not now.at_edge


def test_the_middle_comes_first():
    assert state(Sweep(points=5), {}).missing == [(0, 0), (-1, 0), (1, 0), (-2, 0), (2, 0)]
    assert state(Sweep(points=4), {}).missing == [(0, 0), (-1, 0), (1, 0), (2, 0)]


def test_most_ends_it_and_the_edge_is_said():
    losses, now = play(Sweep(most=5), parabola(9))
    assert sorted(k for k, _ in losses) == [-1, 0, 1, 2, 3]
    assert (now.best, now.at_edge) == (3, True)


def test_one_point_is_no_sweep():
    losses, now = play(Sweep(points=1), parabola(5))
    assert list(losses) == [(0, 0)]
    assert (now.best, now.at_edge) == (0, False)


def test_a_run_that_diverged_is_worse_than_any_other():
    losses, now = play(Sweep(), lambda k, seed: math.inf if k > -2 else 5.0 + k)
    assert now.best is not None
    assert math.isfinite(losses[now.best, 0])


def test_where_all_diverge_lower_rates_are_tried_and_there_is_no_best():
    losses, now = play(Sweep(most=5), lambda k, seed: math.inf)
    assert sorted(k for k, _ in losses) == [-3, -2, -1, 0, 1]
    assert now.best is None
    assert not now.missing


def test_other_seeds_run_at_the_best_rate_only():
    losses, now = play(Sweep(seeds=(3, 1, 2)), parabola(1))
    assert [spot for spot in losses if spot[1] != 3] == [(1, 1), (1, 2)]
    assert now.best == 1
    assert {k for k, seed in losses if seed == 3} == {-1, 0, 1, 2}


def test_a_sweep_ends_alike_whatever_was_run_before():
    """Also runs that no sweep would ask for, left by other settings, change nothing."""
    wanted, last = play(Sweep(seeds=(0, 1)), parabola(2.2))
    everything = {(k, seed): parabola(2.2)(k, seed) for k in range(-7, 8) for seed in (0, 1)}
    draw = random.Random(0)
    for _ in range(50):
        losses = dict(draw.sample(sorted(everything.items()), draw.randrange(len(everything))))
        already = set(losses)
        while (now := state(Sweep(seeds=(0, 1)), losses)).missing:
            spot = now.missing[0]
            assert spot in wanted
            losses[spot] = everything[spot]
        assert (now.best, now.at_edge) == (last.best, last.at_edge)
        assert set(wanted) <= already | set(losses)


def test_the_grid_doubles():
    assert [learning_rate(0.01, k) for k in (-1, 0, 2)] == [0.005, 0.01, 0.04]


def test_runs_left_counts_the_seeds_to_come():
    sweep = Sweep(seeds=(0, 1, 2))
    assert at_least_left(sweep, [state(sweep, {})]) == 3 + 2
    swept = {(k, 0): float(k * k) for k in (-1, 0, 1)}
    assert at_least_left(sweep, [state(sweep, swept)]) == 2
    assert at_least_left(sweep, [state(sweep, swept | {(0, 1): 0.0, (0, 2): 0.0})]) == 0
