"""Measuring the rates of this machine: those of each of several processes while all do the same.

    square     batches of (N, N) x (N, N), for Muon
    thin       Dion's arithmetic on a batch of (N, N) at rank N / 4 and N / 16, by the library's own kernels: the
               product with Q, the orthonormalization of the matrices that a rank owns, the product with P, and two
               updates by factors; rows are cut among the processes
    memory     a += b over arrays far larger than caches, in place like all passes of a step: three accesses per entry
    meetings   collectives between products: see `meetings`

As in a step, a time ends when the last process has finished. Each rate is a median. A process is a rank. This measures
CPUs, not GPUs. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orthoshard.lab.bench.processes import over_gloo, timed
from orthoshard.lab.plan.estimate import Machine
from orthoshard.lab.plan.hardware import QUARTER, SIXTEENTH, Hardware
from orthoshard.lab.plan.meetings import Timed, meetings
from orthoshard.layout import Axis
from orthoshard.linalg.cholesky import cholesky_qr
from orthoshard.linalg.products import rank_r_update_, thin_matmul

WIDTH, BATCH = 1024, 2  # of the matrices in products, and number of these per process
ENTRIES = 2**24  # of the arrays: 64 MiB each
MESSAGES = tuple(2**k for k in (8, 14, 16, 18, 20, 22))  # float32 entries of a process, including its own share
ROUNDS = 7
AGAIN = 4  # repetitions of calls of a few ms, so that they last longer than the system's time slice for a process
LOOPBACK = 1e9  # bytes per second for one process, which has no link


@dataclass(frozen=True)
class Rates:
    """FLOP/s of square products and of Dion's at a quarter and a sixteenth of the width; bytes per second of memory."""

    square: float
    quarter: float
    sixteenth: float
    memory: float


def measure(processes: int, threads: int) -> Hardware:
    """Measure this machine with ``processes`` ranks of ``threads`` threads each, and return its rates."""
    if processes == 1:
        rates, links, link = _rates(1, threads, _elapsed), (), LOOPBACK
    else:
        found: tuple[list[float], list[tuple[float, float]]] = over_gloo(_together, (threads,), processes)
        rates, links = Rates(*found[0]), tuple(found[1])
        link = links[-1][0] / max(links[-1][1], links[-1][0] / rates.memory)
    machine = Machine(
        rates.square, rates.quarter, rates.memory, link, link, processes, rates.square, _capacity() / processes
    )
    about = f"this machine: {processes} at a time, {threads} threads each" if processes > 1 else "this machine"
    gloo = (
        f", {link / 1e9:.2f} GB/s of gloo, {1e3 * links[0][1]:.2g} ms for a collective of {links[0][0]:.0f} bytes "
        f"between products"
        if links
        else ""
    )
    met = ("A collective costs as much as one of its size did between products, including the wait for other ranks.",)
    words = (
        f"Measured on {about}: {rates.square / 1e9:.0f} GFLOP/s in square products, {rates.quarter / 1e9:.0f} and "
        f"{rates.sixteenth / 1e9:.0f} in Dion's at a quarter and a sixteenth of the width, {rates.memory / 1e9:.1f} "
        f"GB/s of memory{gloo}.",
        "All computations are in float32. The peak for the model is the rate of square products.",
        *(met if links else ()),
    )
    return Hardware("measure", about, "measured now", machine, words, rates.sixteenth, links)


def _together(threads: int) -> tuple[list[float], list[tuple[float, float]]]:
    processes = dist.get_world_size()

    def seconds(call: Callable[[], object]) -> float:
        return timed(call) / 1e3

    rates = _rates(processes, threads, seconds)
    M, factor = torch.randn(1, WIDTH // processes, WIDTH), torch.randn(1, WIDTH, WIDTH // 4)
    axis = Axis(("ranks",), "ranks", processes, dist.get_rank(), dist.group.WORLD)
    links = meetings(MESSAGES, axis, lambda: thin_matmul(M, factor), seconds)
    return [rates.square, rates.quarter, rates.sixteenth, rates.memory], links


def _rates(processes: int, threads: int, timed: Timed) -> Rates:
    torch.set_num_threads(threads)
    X = torch.randn(BATCH, WIDTH, WIDTH)
    out = torch.empty_like(X)
    square = 2.0 * BATCH * WIDTH**3 / _median(lambda: torch.bmm(X, X, out=out), timed)
    a, b = torch.ones(ENTRIES), torch.ones(ENTRIES)
    memory = 3 * 4 * ENTRIES / _median(lambda: a.add_(b), timed, AGAIN)
    return Rates(square, _thin(QUARTER, processes, timed), _thin(SIXTEENTH, processes, timed, AGAIN), memory)


def _thin(rank: float, processes: int, timed: Timed, again: int = 1) -> float:
    """Return FLOP/s of Dion's arithmetic at a rank fraction, for `BATCH` matrices per process, each cut among all."""
    r, count = round(rank * WIDTH), BATCH * processes
    M = torch.randn(count, WIDTH // processes, WIDTH)
    W = torch.zeros_like(M)
    Q, P, own = (torch.randn(b, p, r) for b, p in ((count, M.shape[1]), (count, WIDTH), (BATCH, WIDTH)))

    def call() -> None:
        thin_matmul(M.mT, Q)
        cholesky_qr(own)
        thin_matmul(M, P)
        for _ in range(2):
            rank_r_update_(W, Q, P, 1e-12, 1.0)  # so small that values do not grow

    # four products of 2 N N r flops, and an orthonormalization in one pass: 4 N r² + 4/3 r³
    flops = BATCH * (8.0 * WIDTH * WIDTH * r + 4.0 * WIDTH * r**2 + 4 / 3 * r**3)
    return flops / _median(call, timed, again)


def _median(call: Callable[[], object], timed: Timed, again: int = 1) -> float:
    """Return the median seconds of a call. The first two runs are not counted."""

    def several() -> None:
        for _ in range(again):
            call()

    return statistics.median([timed(several) for _ in range(ROUNDS + 2)][2:]) / again


def _elapsed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _capacity() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
