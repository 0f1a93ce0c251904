"""Processes that measure together, and end with the one that started them. May import torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call ``function(rank, *arguments)`` in ``count`` new processes, and wait for all. Raises what one of them raised.

    Ctrl-C in a terminal goes to every process of a command; here the first alone answers it, and ends the others.
    """
    with _deaf():
        started = mp.start_processes(function, arguments, count, join=False, daemon=True, start_method="spawn")
    assert started is not None
    try:
        while not started.join():
            pass
    finally:
        for process in started.processes:
            if process is not None:
                process.terminate()


@contextmanager
def _deaf() -> Generator[None]:
    """What is started within is deaf to Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
