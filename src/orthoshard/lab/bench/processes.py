"""Processes that measure together, and end when the process that started them ends. May import torch."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def over_gloo(
    work: Callable[..., Any], arguments: tuple[Any, ...], count: int, enter: Callable[[int], None] | None = None
) -> Any:
    """Run ``work(*arguments)`` in ``count`` processes, one gloo group with one thread each, and return rank 0's result.

    Each process calls ``enter(rank)`` before it joins the group.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_rank, (work, arguments, count, enter, Path(folder)), count)
        return torch.load(Path(folder) / "result", weights_only=True)


def _rank(
    rank: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    count: int,
    enter: Callable[[int], None] | None,
    folder: Path,
) -> None:
    if enter is not None:
        enter(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    result = work(*arguments)
    if rank == 0:
        torch.save(result, folder / "result")
    dist.barrier()
    dist.destroy_process_group()


def tell(what: str) -> None:
    """Print on stderr, from rank 0 only, what is being timed."""
    if dist.get_rank() == 0:
        print(f"timing {what}", file=sys.stderr, flush=True)


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds until every process has finished ``call``."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return (time.perf_counter() - start) * 1e3


def most(values: Sequence[float]) -> list[float]:
    """Return the largest of each value over all processes."""
    largest = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call ``function(rank, *arguments)`` in ``count`` new processes, and wait for all. Raises what one of them raised.

    Ctrl-C in a terminal goes to every process of a command. Only this process reacts to it, and ends the others.
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
    """Let processes that start in this context ignore Ctrl-C from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
