"""This machine, measured: what each of several processes does in a second while all do the same.

    products   batches of (N, N) x (N, N) for Muon; for Dion x (N, N / 4) and (N, N / 16) and the updates by factors of
               these ranks, half of the arithmetic each, by the library's own kernels: the median of some runs
    memory     a += b over arrays far larger than caches, in place as all passes of a step are: three accesses an entry
    link       an all-to-all of gloo, every process at once, of short messages and long: bytes that leave a process a
               second

A process is a rank. Its processors are measured, not a GPU. May import torch.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orthoshard.linalg.products import outer, thin
from orthoshard.planner.estimate import Machine
from orthoshard.planner.hardware import Hardware

WIDTH, BATCH = 1024, 2  # of the products
ENTRIES = 2**24  # of the arrays: 64 MiB each
MESSAGES = tuple(2**k for k in range(8, 23, 2))  # float32 entries that a process sends to all, itself too
ROUNDS = 7
LOOPBACK = 1e9  # bytes a second, where there is one process and no link


def measure(processes: int, threads: int) -> Hardware:
    """``processes`` ranks on this machine, of so many threads each."""
    if processes == 1:
        figures = _figures(threads, lambda: None)
        links, link = (), LOOPBACK
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results"
            mp.start_processes(_rank, (processes, threads, folder, str(results)), processes, start_method="spawn")
            found: list[float] = torch.load(results, weights_only=True)
        figures = (found[0], found[1], found[2], found[3])
        share = 4 * (processes - 1) / processes
        links = tuple((share * entries, rate) for entries, rate in zip(MESSAGES, found[4:], strict=True))
        link = links[-1][1]
    square, quarter, thin, memory = figures
    machine = Machine(square, quarter, memory, link, link, processes, square, _capacity() / processes)
    about = f"this machine: {processes} at a time, {threads} threads each" if processes > 1 else "this machine"
    gloo = f", {link / 1e9:.2f} GB/s of gloo" if processes > 1 else ""
    words = (
        f"Measured on {about}: {square / 1e9:.0f} GFLOP/s in square products, {quarter / 1e9:.0f} and "
        f"{thin / 1e9:.0f} in products of a quarter and a sixteenth of the width, {memory / 1e9:.1f} GB/s of "
        f"memory{gloo}.",
        "Everything is float32; the model's peak is the rate of square products.",
    )
    return Hardware("measure", about, "measured now", machine, words, thin, links)


def _rank(rank: int, processes: int, threads: int, folder: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    rates = _figures(threads, dist.barrier)
    links: list[float] = []
    for entries in MESSAGES:
        mine, other = torch.zeros(entries), torch.empty(entries)
        seconds = _median(lambda mine=mine, other=other: dist.all_to_all_single(other, mine), dist.barrier)
        links.append(4 * entries * (processes - 1) / processes / seconds)
    figures = torch.tensor([*rates, *links], dtype=torch.float64)
    dist.all_reduce(figures)
    if rank == 0:
        torch.save((figures / processes).tolist(), results)
    dist.barrier()
    dist.destroy_process_group()


def _figures(threads: int, together: Callable[[], object]) -> tuple[float, float, float, float]:
    """FLOP/s of square products, of a quarter and of a sixteenth, and bytes a second of memory."""
    torch.set_num_threads(threads)
    X = torch.randn(BATCH, WIDTH, WIDTH)
    out = torch.empty_like(X)
    work = 2.0 * BATCH * WIDTH**3
    rates = [work / _median(lambda: torch.bmm(X, X, out=out), together)]
    for part in (4, 16):
        Q = X[:, :, : WIDTH // part].contiguous()
        seconds = _median(lambda Q=Q: thin(X, Q), together)
        seconds += _median(lambda Q=Q: outer(out, Q, Q, 1e-12, 1.0), together)  # so small that nothing grows
        rates.append(2 * work / part / seconds)
    a, b = torch.ones(ENTRIES), torch.ones(ENTRIES)
    memory = 3 * 4 * ENTRIES / _median(lambda: a.add_(b), together)
    return rates[0], rates[1], rates[2], memory


def _median(call: Callable[[], object], together: Callable[[], object]) -> float:
    """Seconds; the first two runs are not counted."""
    times: list[float] = []
    for _ in range(ROUNDS + 2):
        together()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _capacity() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
