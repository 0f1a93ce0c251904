"""Runs the updates of a step, several in flight: while one waits, mostly for the network, the next one computes.

Updates are started and advanced in plan order, never "whichever is ready": every rank must issue its collectives in
the same order. So how many are in flight depends on what every rank knows alike: their number, and the bytes of
temporaries that each holds at most, on whichever rank. May import this room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .comm import Pending
from .gather import Task

# Two would hide the network behind arithmetic where each takes as long; more helps where sizes differ, and they share
# the launches of their work on r x r matrices. Every one holds its temporaries.
IN_FLIGHT = 8
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


def most_in_flight(tasks: Iterable[tuple[int, int]]) -> int:
    """The most bytes that tasks hold together: of each what it holds, and what `run` is told of it. A bound: as if any
    of them could meet, and the last in part."""
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
    """What the oldest task waits for is waited for, and the task goes on to its next one."""
    task, size, pending = waiting.popleft()
    pending.wait()
    del pending  # and what it holds
    _advance(task, size, waiting)


def _advance(task: Task, size: int, waiting: Waiting) -> None:
    pending = next(task, None)
    if pending is not None:
        waiting.append((task, size, pending))
