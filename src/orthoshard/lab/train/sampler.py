"""The tokens of a step, as a pure function of the seed and the step number, so there is nothing to save or restore.

The shards are cut into windows of `context` + 1 tokens (the last token of a window is the first of the next). Samples
are numbered through the whole run: sample i belongs to epoch i // windows, and is window π(i mod windows) of that
epoch, where π is a permutation that depends on (seed, epoch). So an epoch sees every window once, and a step of
`accumulate` micro-batches sees exactly the samples of one big batch. The windows are shifted from epoch to epoch.

π is a Feistel network over the next power of four, iterated until the result is a window (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002); its round function is SplitMix64's finalizer (Steele, Lea, Flood, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthoshard.lab.train.tokens import Tokens

ROUNDS = 4
U64 = NDArray[np.uint64]


def mix(*words: U64 | int) -> U64:
    """Return a 64-bit hash of all words, element by element."""
    h = np.zeros(1, dtype=np.uint64)
    for word in words:
        h = h + np.uint64(0x9E3779B97F4A7C15) + np.atleast_1d(np.asarray(word, dtype=np.uint64))
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def permute(index: U64, size: int, key: U64) -> U64:
    """Return π_key(index), for each key a permutation of 0 .. size-1."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.copy()
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (mix(key[outside], r, right) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result


class Sampler:
    """Windows of ``context`` + 1 tokens of ``shards``, by sample number."""

    def __init__(self, shards: Sequence[Tokens], context: int, seed: int) -> None:
        self.shards = list(shards)
        self.context = context
        self.seed = seed
        # Of a shard with several windows one is given up, to leave room for the shift.
        fits = [(len(shard) - 1) // context for shard in self.shards]
        self._count = np.array([max(n - 1, min(n, 1)) for n in fits], dtype=np.int64)
        slack = np.array([len(s) - 1 for s in self.shards], dtype=np.int64) - self._count * context
        self._slack = np.clip(slack, 0, context - 1).astype(np.uint64)
        self._first = np.concatenate([[0], np.cumsum(self._count)])
        self.windows = int(self._first[-1])

    def batch(self, step: int, micro: int, size: int, accumulate: int) -> NDArray[np.int64]:
        """Return the tokens (size, context + 1) of micro-batch ``micro`` of ``accumulate`` in ``step`` (from 0)."""
        first = (step * accumulate + micro) * size
        shard, offset = self.offsets(np.arange(first, first + size, dtype=np.uint64))
        return read(self.shards, shard, offset, self.context)

    def offsets(self, sample: U64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each sample number the shard, and the offset in it at which the window begins."""
        epoch, place = sample // np.uint64(self.windows), sample % np.uint64(self.windows)
        window = permute(place, self.windows, mix(self.seed, 1, epoch)).astype(np.int64)
        shard = np.searchsorted(self._first, window, side="right") - 1
        shift = mix(self.seed, 2, epoch, shard.astype(np.uint64)) % (self._slack[shard] + np.uint64(1))
        return shard, (window - self._first[shard]) * self.context + shift.astype(np.int64)


def validation_batches(shards: Sequence[Tokens], context: int, batch: int, batches: int) -> list[NDArray[np.int64]]:
    """Return at most ``batches`` arrays (batch, context + 1) of evenly spaced windows, always the same.

    The list is empty if no window fits into a shard.
    """
    count = np.array([max(0, (len(shard) - 1) // context) for shard in shards], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(count)])
    total = int(first[-1])
    chosen = min(total, batch * batches)
    window = np.arange(chosen, dtype=np.int64) * total // max(chosen, 1)
    shard = np.searchsorted(first, window, side="right") - 1
    tokens = read(shards, shard, (window - first[shard]) * context, context)
    return [tokens[i : i + batch] for i in range(0, chosen, batch)]


def read(shards: Sequence[Tokens], shard: NDArray[Any], offset: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    rows = [shards[s][o : o + context + 1] for s, o in zip(shard.tolist(), offset.tolist(), strict=True)]
    return np.stack(rows).astype(np.int64) if rows else np.zeros((0, context + 1), dtype=np.int64)
