"""Runs the updates of a step, several in flight: while one waits, mostly for the network, the next one computes.

Updates are started and advanced in plan order, never "whichever is ready": every rank must issue its collectives in
the same order. So how many are in flight depends on what every rank knows alike: their number, and the bytes of
temporaries that each holds at most, on whichever rank. May import this room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from .comm import Pending
from .gather import Task

# Two would hide the network behind arithmetic where each takes as long; more helps where sizes differ, and every one
# holds its temporaries.
IN_FLIGHT = 4
# Of these temporaries, together; one update alone may hold more.
IN_FLIGHT_BYTES = 3 * 2**29

Waiting = deque[tuple[Task, int, Pending]]


def run(tasks: Iterable[tuple[Task, int]]) -> None:
    """Bring every task to its end; each comes with the bytes that it holds."""
    waiting: Waiting = deque()
    for task, size in tasks:
        while waiting and not _room(waiting, size):
            _turn(waiting)
        _advance(task, size, waiting)
    while waiting:
        _turn(waiting)


def most_in_flight(sizes: Sequence[int], capped: bool) -> int:
    """What tasks that hold so much have together, at most. ``capped``: `run` is told what they hold."""
    largest = sorted(sizes, reverse=True)[:IN_FLIGHT]
    together = sum(largest)
    return max(max(largest, default=0), min(together, IN_FLIGHT_BYTES)) if capped else together


def _room(waiting: Waiting, size: int) -> bool:
    held = sum(size for _, size, _ in waiting)
    return len(waiting) < IN_FLIGHT and held + size <= IN_FLIGHT_BYTES


def _turn(waiting: Waiting) -> None:
    """What the oldest task waits for is waited for, and the task goes on to its next one."""
    task, size, pending = waiting.popleft()
    pending.wait()
    del pending  # and what it holds
    _advance(task, size, waiting)


def _advance(task: Task, size: int, waiting: Waiting) -> None:
    pending = next(task, None)
    if pending is not None:
        waiting.append((task, size, pending))
