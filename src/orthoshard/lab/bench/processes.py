"""Processes that measure together, and end with the one that started them. May import torch."""

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
    """Return what ``work(*arguments)`` returns in the first of ``count`` processes that are one gloo group, each of
    one thread. ``enter(rank)`` comes before the group."""
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
    """Say on stderr how far the processes are: one of them."""
    if dist.get_rank() == 0:
        print(f"timing {what}", file=sys.stderr, flush=True)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds until the last process is done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return (time.perf_counter() - start) * 1e3


def most(values: Sequence[float]) -> list[float]:
    """Of any process."""
    largest = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


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
