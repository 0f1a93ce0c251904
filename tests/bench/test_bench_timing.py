"""The rounds: everyone once a round, in an order that changes; how many there are; what their spread is."""

import itertools

import pytest
import torch

from orthoshard.lab.bench.timing import Spread, clock, rotation, run_rounds


def count_calls(names, **options):
    """Runs the rounds on steps that only note their name, with a clock that gives 1, 2, 3, ... ms."""
    order: list[str] = []
    ticks = itertools.count(1)

    def milliseconds(call):
        call()
        return float(next(ticks))

    steps = {name: (lambda name=name: order.append(name)) for name in names}
    return order, run_rounds(steps, milliseconds, **options)


def test_everyone_steps_once_a_round():
    order, spreads = count_calls("abcd", rounds=6, seconds=1)
    rounds = [order[k : k + 4] for k in range(0, 24, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "always the same order"
    assert all(len(spread.times) == 6 for spread in spreads.values())
    # the k-th call took k ms, whoever made it
    for name, spread in spreads.items():
        assert spread.times == tuple(float(k) for k, who in enumerate(order, start=1) if who == name)


def test_the_order_is_the_same_for_the_same_seed():
    first = list(itertools.islice(rotation("abcdef", seed=4), 5))
    assert first == list(itertools.islice(rotation("abcdef", seed=4), 5))
    assert first != list(itertools.islice(rotation("abcdef", seed=5), 5))


def fake_time(seconds_a_look: float):
    looks = itertools.count()
    return lambda: next(looks) * seconds_a_look


def test_rounds_end_before_the_time_is_over():
    # one look at the start and one a round: a round lasts 10 s, and the eleventh would end at 110 s
    order, _ = count_calls("ab", rounds=None, seconds=100, now=fake_time(10))
    assert len(order) == 2 * 10


def test_three_rounds_at_least():
    order, _ = count_calls("ab", rounds=None, seconds=1, now=fake_time(10))
    assert len(order) == 2 * 3


def test_a_count_of_rounds_beats_the_time():
    order, _ = count_calls("ab", rounds=2, seconds=1, now=fake_time(10))
    assert len(order) == 2 * 2


def test_progress_ends_at_one():
    heard: list[tuple[int, float]] = []
    count_calls("ab", rounds=4, seconds=1, progress=lambda done, share: heard.append((done, share)))
    assert heard == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]


def test_spread():
    spread = Spread((5.0, 1.0, 4.0, 2.0))
    assert (spread.median, spread.least, spread.most) == (3.0, 1.0, 5.0)


def test_the_cpu_clock_runs_the_call_once():
    calls: list[int] = []
    assert clock(torch.device("cpu"))(lambda: calls.append(1)) >= 0
    assert calls == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_clock_waits_for_the_work():
    x = torch.randn(4096, 4096, device="cuda")
    milliseconds = clock(torch.device("cuda"))
    small, large = milliseconds(lambda: x @ x), milliseconds(lambda: [x @ x for _ in range(50)])
    assert large > 5 * small
