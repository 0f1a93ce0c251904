"""Timing the steps of many contestants in turn: in every round each takes one step, in a new order.

A round is about as long as those disturbances of the machine that matter, so they affect all contestants alike, and the
ratio of two medians says more than either. The order is shuffled (with a seed), so that a contestant does not always
follow the same one, and find its data in the caches. May import torch and the standard library.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[Callable[[], object]], float]
MIN_ROUNDS = 3


def clock(device: torch.device) -> Clock:
    """Return a function that makes a call, waits until ``device`` has finished it, and returns the milliseconds."""
    if device.type == "cuda":
        return _cuda_milliseconds
    return _cpu_milliseconds


def _cpu_milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_milliseconds(call: Callable[[], object]) -> float:
    # The queue is empty at the start, so the host's time for launches counts if the GPU waits for it.
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def rotation(names: Sequence[str], seed: int = 0) -> Iterator[list[str]]:
    """Yield rounds without end, each a new shuffle of all names. The order is the same on every machine."""
    draw = random.Random(seed)
    while True:
        order = list(names)
        draw.shuffle(order)
        yield order


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds of the timed steps, in the order in which they ran."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def least(self) -> float:
        return min(self.times)

    @property
    def most(self) -> float:
        return max(self.times)


def run_rounds(
    steps: dict[str, Callable[[], object]],
    milliseconds: Clock,
    rounds: int | None,
    seconds: float,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Spread]:
    """Call every step once a round and return the times, for ``rounds`` rounds or, if that is None, for ``seconds``.

    Without ``rounds``, at least ``MIN_ROUNDS`` rounds run. ``progress`` is called with the number of finished rounds
    and the finished share of the work.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = now()
    for done, order in enumerate(rotation(list(steps), seed), start=1):
        for name in order:
            times[name].append(milliseconds(steps[name]))
        spent = now() - start
        share = done / rounds if rounds else min(spent / seconds, done / MIN_ROUNDS)
        if progress is not None:
            progress(done, min(share, 1.0))
        # A round that would exceed the time is not begun.
        over = done >= rounds if rounds else done >= MIN_ROUNDS and spent + spent / done > seconds
        if over:
            break
    return {name: Spread(tuple(values)) for name, values in times.items()}
