"""The seconds that a collective costs ranks that compute before and after it, by the bytes that each of them sends.

    T(bytes) = (n exchanges, a product before each - the same n products alone) / n        until the last rank has ended

An exchange is the engine's own reduce-scatter or all-gather by matrices. So T includes the wait for the last rank, the
processor time of gloo, copies before and after, and the transfer of the bytes. It involves no optimizer and no plan.
May import torch and ``orthoshard.engine``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthoshard.engine.comm import Comm
from orthoshard.engine.gather import Task, gather, reduce_scatter
from orthoshard.engine.run import run
from orthoshard.layout import Axis

EXCHANGES = 8  # in a timed run
ROUNDS = 7

Timed = Callable[[Callable[[], object]], float]


def meetings(entries: Sequence[int], axis: Axis, work: Callable[[], object], timed: Timed) -> list[tuple[float, float]]:
    """Return pairs (bytes that a rank sends, seconds) for collectives of these numbers of float32 entries per rank.

    The entries include the rank's own share. ``timed`` returns the seconds until the last rank has finished a call; all
    ranks make the same calls.
    """

    def working() -> None:
        for _ in range(EXCHANGES):
            work()

    found: list[tuple[float, float]] = []
    for number in entries:
        x = torch.zeros(axis.size, number // axis.size)

        def exchanging(x: Tensor = x) -> None:
            run([(_exchanges(x, axis, work), 0)])

        timed(exchanging)
        more = statistics.median(timed(exchanging) - timed(working) for _ in range(ROUNDS))
        found.append((float(4 * (x.numel() - x.shape[1])), max(more / EXCHANGES, 0.0)))  # below 0: noise
    return found


def _exchanges(x: Tensor, axis: Axis, work: Callable[[], object]) -> Task:
    """Make the exchanges: by turns a reduce-scatter to owners and an all-gather from them, with work before each."""
    comm, counts = Comm(), [1] * axis.size
    for _ in range(EXCHANGES // 2):
        work()
        own = yield from reduce_scatter(x, counts, axis, comm, x.dtype)
        work()
        yield from gather((own,), counts, axis, comm)
