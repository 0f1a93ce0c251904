"""This machine, measured: what each of several processes does in a second while all do the same.

    square     batches of (N, N) x (N, N), for Muon
    thin       what Dion computes of a batch of (N, N) at rank N / 4, and N / 16, by the library's own kernels: the
               product with Q, the orthonormalization of the matrices that a rank owns, the product with P, and two
               updates by factors; rows cut among the processes
    memory     a += b over arrays far larger than caches, in place as all passes of a step are: three accesses an entry
    meetings   collectives between products: see `meetings`

A time ends when the last process has ended, as a step does, and is the median of some. A process is a rank. Its
processors are measured, not a GPU. May import torch and ``orthoshard``.
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

WIDTH, BATCH = 1024, 2  # of the products: so many matrices a process
ENTRIES = 2**24  # of the arrays: 64 MiB each
MESSAGES = tuple(2**k for k in (8, 14, 16, 18, 20, 22))  # float32 entries of a process, its own share too
ROUNDS = 7
AGAIN = 4  # calls in a row of what takes a few ms: more than the time for which a kernel lets a process run
LOOPBACK = 1e9  # bytes a second, where there is one process and no link


@dataclass(frozen=True)
class Rates:
    """FLOP/s of square products and of Dion's at a quarter and a sixteenth of the width; bytes a second of memory."""

    square: float
    quarter: float
    sixteenth: float
    memory: float


def measure(processes: int, threads: int) -> Hardware:
    """``processes`` ranks on this machine, of so many threads each."""
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
    met = ("Each collective costs what one of its size did between products, waiting for the others included.",)
    words = (
        f"Measured on {about}: {rates.square / 1e9:.0f} GFLOP/s in square products, {rates.quarter / 1e9:.0f} and "
        f"{rates.sixteenth / 1e9:.0f} in Dion's of a quarter and a sixteenth of the width, {rates.memory / 1e9:.1f} "
        f"GB/s of memory{gloo}.",
        "Everything is float32; the model's peak is the rate of square products.",
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
    """FLOP/s of Dion's arithmetic at this rank fraction: of `BATCH` matrices a process, each cut among all of them."""
    r, count = round(rank * WIDTH), BATCH * processes
    M = torch.randn(count, WIDTH // processes, WIDTH)
    W = torch.zeros_like(M)
    Q, P, own = (torch.randn(b, p, r) for b, p in ((count, M.shape[1]), (count, WIDTH), (BATCH, WIDTH)))

    def call() -> None:
        thin_matmul(M.mT, Q)
        cholesky_qr(own)
        thin_matmul(M, P)
        for _ in range(2):
            rank_r_update_(W, Q, P, 1e-12, 1.0)  # so small that nothing grows

    # four products of 2 N N r flops, and an orthonormalization in one pass: 4 N r² + 4/3 r³
    flops = BATCH * (8.0 * WIDTH * WIDTH * r + 4.0 * WIDTH * r**2 + 4 / 3 * r**3)
    return flops / _median(call, timed, again)


def _median(call: Callable[[], object], timed: Timed, again: int = 1) -> float:
    """Seconds; the first two runs are not counted."""

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
