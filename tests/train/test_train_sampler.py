"""The sampler: a pure function of (seed, step); an epoch sees everything once, micro-batches make up the big batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthoshard.lab.train.sampler import Sampler, mix, permute, validation_batches


def shards(*lengths: int) -> list[np.ndarray]:
    """Every token is its own global position, so that a batch says where it was read."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.uint32) for a, b in pairwise(ends)]


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    permuted = permute(index, size, np.full(size, key, dtype=np.uint64))
    assert sorted(permuted.tolist()) == list(range(size))


def test_permutation_looks_random() -> None:
    """Where two neighbours go, over 5000 keys, in 5 x 5 bins: chi-square with 24 degrees of freedom, 1e-5 tail."""
    keys = mix(5, np.arange(5000, dtype=np.uint64))
    one, two = (permute(np.full(5000, i, dtype=np.uint64), 1000, keys) // np.uint64(200) for i in (6, 7))
    counts = np.bincount((one * np.uint64(5) + two).astype(np.int64), minlength=25)
    assert float(((counts - 200) ** 2 / 200).sum()) < 66


def test_splitmix_matches_its_published_sequence() -> None:
    """The first outputs of SplitMix64 seeded with 0 (Vigna's reference program)."""
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    assert int(mix(0x9E3779B97F4A7C15)[0]) == 0x6E789E6AA1B965F4


def test_a_step_needs_only_its_number() -> None:
    data = shards(1000, 777)
    one, two = Sampler(data, 16, seed=3), Sampler(data, 16, seed=3)
    for step in range(50):
        one.batch(step, 0, 4, 1)
    assert np.array_equal(one.batch(57, 0, 4, 1), two.batch(57, 0, 4, 1))
    assert not np.array_equal(one.batch(57, 0, 4, 1), Sampler(data, 16, seed=4).batch(57, 0, 4, 1))
    assert not np.array_equal(one.batch(57, 0, 4, 1), one.batch(58, 0, 4, 1))


def test_micro_batches_are_the_big_batch() -> None:
    sampler = Sampler(shards(5000), 16, seed=0)
    for step in (0, 1, 99):
        big = sampler.batch(step, 0, 12, 1)
        small = np.concatenate([sampler.batch(step, micro, 3, 4) for micro in range(4)])
        assert np.array_equal(big, small)


@pytest.mark.parametrize("lengths", [(1000,), (33,), (17, 18, 500), (5, 400)])
def test_an_epoch_sees_every_window_once(lengths: tuple[int, ...]) -> None:
    context = 16
    data = shards(*lengths)
    sampler = Sampler(data, context, seed=1)
    n = sampler.windows
    assert n == sum(max(f - 1, min(f, 1)) for f in ((length - 1) // context for length in lengths))
    seen: list[list[int]] = []
    for epoch in range(3):
        tokens = sampler.batch(epoch, 0, n, 1)
        assert tokens.shape == (n, context + 1)
        assert (np.diff(tokens) == 1).all()  # each window is a run of one shard
        ends = np.cumsum(lengths)
        first, last = np.searchsorted(ends, tokens[:, 0], "right"), np.searchsorted(ends, tokens[:, -1], "right")
        assert (first == last).all()
        inputs = tokens[:, :-1].ravel().tolist()
        assert len(set(inputs)) == len(inputs)  # no token is an input twice in an epoch
        seen.append(tokens[:, 0].tolist())
    if n > 5:
        assert seen[0] != seen[1] != seen[2]


def test_validation_windows_are_fixed_and_spread() -> None:
    data = shards(1000, 50)
    batches = validation_batches(data, 16, 4, 5)
    assert [b.shape for b in batches] == [(4, 17)] * 5
    starts = np.concatenate(batches)[:, 0]
    assert (np.diff(starts) > 0).all()
    assert starts[0] == 0
    assert starts[-1] > 900
    assert all(np.array_equal(a, b) for a, b in zip(batches, validation_batches(data, 16, 4, 5), strict=True))
    assert sum(map(len, validation_batches(shards(100), 16, 4, 5))) == 6  # all that fit
    assert validation_batches(shards(16), 16, 4, 5) == []
