"""Runs the updates of a step, several in flight: while one waits, mostly for the network, the next one computes.

Updates are started and advanced in plan order, never "whichever is ready": every rank must issue its collectives in
the same order. May import this room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .comm import Pending
from .gather import Task

# Two would hide the network behind arithmetic where each takes as long; more helps where sizes differ, and every one
# holds its temporaries.
IN_FLIGHT = 4


def run(tasks: Iterable[Task]) -> None:
    """Bring every task to its end."""
    waiting: deque[tuple[Task, Pending]] = deque()
    for task in tasks:
        _advance(task, waiting)
        while len(waiting) >= IN_FLIGHT:
            _turn(waiting)
    while waiting:
        _turn(waiting)


def _turn(waiting: deque[tuple[Task, Pending]]) -> None:
    """What the oldest task waits for is waited for, and the task goes on to its next one."""
    task, pending = waiting.popleft()
    pending.wait()
    _advance(task, waiting)


def _advance(task: Task, waiting: deque[tuple[Task, Pending]]) -> None:
    pending = next(task, None)
    if pending is not None:
        waiting.append((task, pending))
