"""Milliseconds of each pass over full-size matrices, torch's form and Triton's; of orthonormalization; of steps.

    python experiments/gpu/passes.py [--device cuda] [--out passes.json]       the tables of docs/numerics.md

Shapes are those of Llama-3.2-1B: bfloat16 weights and gradients, float32 state. On a CPU everything is tiny, to try the
script. Times are medians between CUDA events; what the GPU itself works on in a step is the profiler's device time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import orthoshard
from orthoshard import Dion, DionTail, Muon, kernels
from orthoshard import plan as plans
from orthoshard.lab.bench.environment import describe
from orthoshard.lab.bench.models import find_model
from orthoshard.linalg import accumulate as sweeps
from orthoshard.linalg.cholesky import cholesky_qr
from orthoshard.linalg.host_sync import no_host_sync
from orthoshard.linalg.products import narrow_matmul

MATRICES, ROUNDS, MIB = 16, 7, 2**20


def timed(f: Callable[[], Any], device: torch.device) -> float:
    """Return the median of some calls, in ms, after two that do not count."""
    times = list[float]()
    for number in range(2 + ROUNDS):
        start = time.perf_counter()
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            f()
            last.record()
            torch.cuda.synchronize()
            taken = first.elapsed_time(last)
        else:
            f()
            taken = (time.perf_counter() - start) * 1e3
        times += [taken] if number > 1 else []
    return statistics.median(times)


def passes(m: int, n: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every pass on a batch of matrices, by name."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(MATRICES, *shape, device=device)

    M, update, ones = normal(m, n), normal(m, n).half(), torch.ones(MATRICES, 1, 1, device=device)
    G, W = (list(normal(m, n).bfloat16().split(1)) for _ in range(2))
    yield "accumulate", lambda: sweeps.accumulate(M, G, 0.95)
    yield "look_ahead", lambda: sweeps.look_ahead(M, G, 0.95)
    yield "look_back", lambda: sweeps.look_back(list(sweeps.blocks(M, G)), G, 0.95)
    yield "scaled_copy", lambda: sweeps.scaled_copy(M, ones, torch.half)
    yield "wide_row_squares", lambda: sweeps.wide_row_squares(M)
    yield "add_scaled", lambda: sweeps.add_scaled(W, update, -1e-3, 0.999)
    for r in (min(128, n), min(512, n)):
        L, R, d = normal(m, r) * 0.03, normal(n, r) * 0.03, torch.rand(MATRICES, m, 1, device=device)
        taken, added = sweeps.Product(L, R, -0.05, ones), sweeps.Product(L, R, -1e-3)
        yield f"X Q in float16, rank {r}", lambda R=R: narrow_matmul(update, R)
        yield f"add_product, rank {r}", lambda L=L, R=R: sweeps.add_product(W, L, R, -1e-3, 0.999)
        for precision in ("tf32", "float32"):
            tag = f", rank {r}, {precision}"
            both = partial(sweeps.add_products, M, taken, W, added, 0.999, precision)
            rows = partial(sweeps.add_product_and_rows, W, L, R, d, M, -1e-3, 0.999, precision)
            yield "add_products" + tag, both
            yield "add_product_and_rows" + tag, rows


def algebra(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return what orthonormalizations are made of, in float32 and float64, and thin products of both."""
    b, m, r = (16, 8192, 512) if device.type == "cuda" else (2, 64, 16)
    for dtype in (torch.float32, torch.float64):
        Y = torch.randn(b, m, r, device=device, dtype=dtype)
        gram, eye = Y.mT @ Y, torch.eye(r, device=device, dtype=dtype).expand(b, r, r)
        lower = torch.linalg.cholesky(gram)
        yield f"Gram matrix, {dtype}", lambda Y=Y: torch.bmm(Y.mT, Y)
        yield f"Cholesky, {dtype}", lambda gram=gram: torch.linalg.cholesky_ex(gram)
        yield f"inverse triangle, {dtype}", partial(torch.linalg.solve_triangular, lower.mT, eye, upper=True)
        yield f"product r x r, {dtype}", lambda gram=gram: torch.bmm(gram, gram)


def steps(device: torch.device) -> Iterator[tuple[str, int, Callable[[list[nn.Parameter]], Any]]]:
    """Return optimizers by name, with the MiB of weights in one bucket."""
    yield "adamw fused", 512, lambda weights: torch.optim.AdamW(weights, fused=device.type == "cuda" or None)
    for mib, (rule, rank) in product((128, 512, 2048), product((Dion, DionTail), (1 / 16, 1 / 4))):
        yield f"{rule.__name__} {rank:g}", mib, partial(rule, rank_fraction=rank)
    yield "Dion 0.0625, torch's forms", 512, partial(Dion, rank_fraction=1 / 16, kernels="torch")
    yield "DionTail 0.25, torch's forms", 512, partial(DionTail, rank_fraction=1 / 4, kernels="torch")
    yield "Muon", 512, Muon
    yield "Muon, torch's forms", 512, partial(Muon, kernels="torch")
    yield "torch.optim.Muon", 512, torch.optim.Muon
    if device.type == "cuda":
        for rule, rank in product((Dion, DionTail), (1 / 16, 1 / 4)):
            yield f"{rule.__name__} {rank:g}, captured", 512, partial(rule, rank_fraction=rank, capturable=True)
        yield "Muon, captured", 512, partial(Muon, capturable=True)


def step(make: Callable[[list[nn.Parameter]], Any], device: torch.device, layers: int) -> dict[str, Any]:
    """Time a step in ms. On a GPU also count its kernels and how long they run, by the profiler."""
    shapes = find_model("llama-3.2-1b" if device.type == "cuda" else "tiny").first(layers).matrices
    weights = [nn.Parameter((torch.randn(shape, device=device) * 0.02).bfloat16()) for shape in shapes]
    for weight in weights:
        weight.grad = (torch.randn_like(weight, dtype=torch.float32) * 1e-3).bfloat16()
    optimizer = make(weights)
    take = orthoshard.graphed(optimizer) if getattr(optimizer, "capturable", False) else optimizer.step
    found: dict[str, Any] = {"ms": timed(take, device)}
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            take()
            torch.cuda.synchronize()
        ran = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        found |= {"kernels": len(ran), "device_ms": sum(event.device_time for event in ran) / 1e3}
        found["temporaries"] = torch.cuda.max_memory_allocated() - held
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--layers", type=int, default=0, help="0: all")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    device = torch.device(given.device)
    large = device.type == "cuda"
    found: dict[str, Any] = {
        **describe(device),
        "command": " ".join(["python", *sys.argv]),
        "passes": {},
        "algebra": {},
        "orthonormalization": {},
        "steps": {},
    }

    def add(section: str, name: str, result: Any) -> None:
        found[section][name] = result
        print(section, name, result, flush=True)

    for m, n in ((8192, 2048), (2048, 2048)) if large else ((64, 48),):
        for form in ("torch", "triton") if large else ("torch",):
            with kernels.using(form):
                for name, call in passes(m, n, device):
                    add("passes", f"{m} x {n}, {form}: {name}", round(timed(call, device), 3))
    for name, call in algebra(device):
        add("algebra", name, round(timed(call, device), 3))
    for m, r in ((2048, 128), (2048, 512), (8192, 512)) if large else ((64, 16),):
        Y = torch.randn(MATRICES, m, r, device=device)
        for tag, reads in (("", nullcontext), (", the host reads nothing", no_host_sync)):
            with reads():
                taken = timed(partial(cholesky_qr, Y, 5e-4), device)
                add("orthonormalization", f"{MATRICES}, {m}, {r}{tag}", round(taken, 3))
    for name, mib, make in steps(device):
        plans.BUCKET_BYTES_ELSEWHERE = mib * MIB
        add("steps", f"{name}, buckets of {mib} MiB", step(make, device, given.layers))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
