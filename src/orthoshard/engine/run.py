"""Runs the updates of a step, several in flight: while one waits, mostly for the network, the next one computes.

Updates are started and advanced in plan order, never "whichever is ready": every rank must issue its collectives in
the same order. So how many are in flight depends only on what every rank knows alike: their number, and the most bytes
of temporaries that each holds on any rank. May import this room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .comm import Pending
from .gather import Task

# Two would hide the network behind arithmetic if both take equally long. More help if sizes differ, and they share
# the launches of their work on r x r matrices. But each holds its temporaries.
IN_FLIGHT = 8
# The limit of these temporaries together; one update alone may hold more.
IN_FLIGHT_BYTES = 3 * 2**29

Waiting = deque[tuple[Task, int, Pending]]


def run(tasks: Iterable[tuple[Task, int]]) -> None:
    """Run every task to its end. Each comes with the bytes that it holds."""
    waiting: Waiting = deque()
    for task, size in tasks:
        while waiting and not _room(waiting, size):
            _turn(waiting)
        _advance(task, size, waiting)
    while waiting:
        _turn(waiting)


def most_in_flight(tasks: Iterable[tuple[int, int]]) -> int:
    """Return the most bytes that tasks hold together, from what each holds and what `run` is told of it. This is an
    upper bound: it assumes that any tasks may be in flight together, the last one in part."""
    most, held, room = 0, 0.0, 1.0 * IN_FLIGHT_BYTES
    for holds, told in sorted(tasks, key=lambda task: task[0] / max(task[1], 1), reverse=True):
        most = max(most, holds)
        share = min(1.0, room / told) if told else 1.0
        held, room = held + share * holds, room - share * told
    return max(most, int(held))


def _room(waiting: Waiting, size: int) -> bool:
    held = sum(size for _, size, _ in waiting)
    return len(waiting) < IN_FLIGHT and held + size <= IN_FLIGHT_BYTES


def _turn(waiting: Waiting) -> None:
    """Wait for what the oldest task waits for, and advance the task."""
    task, size, pending = waiting.popleft()
    pending.wait()
    del pending  # and what it holds
    _advance(task, size, waiting)


def _advance(task: Task, size: int, waiting: Waiting) -> None:
    pending = next(task, None)
    if pending is not None:
        waiting.append((task, size, pending))
