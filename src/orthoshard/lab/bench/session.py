"""Parts that the modes share: checks of device and memory, threads, the progress bar, and writing the results.

May import rich, torch and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from orthoshard.lab.bench.checks import check_kernels, check_memory, check_numbers, find_device
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import Contestant, memory_needed
from orthoshard.lab.bench.environment import describe, load
from orthoshard.lab.bench.files import claim, write_json
from orthoshard.lab.bench.measure import Plan
from orthoshard.lab.bench.models import ModelShapes

SAID_EVERY = 5.0  # seconds
DISTURBED = 1.5  # times the shortest step: more than the spread on an otherwise idle machine


def plan_of(config: BenchConfig, shapes: ModelShapes, chosen: list[Contestant]) -> Plan:
    """Check the flags, set threads and precision of products, and return the plan. Raises ValueError."""
    check_numbers(config)
    device = find_device(config.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    check_kernels(chosen, device)
    who = f"{len(chosen)} contestants on {shapes.name}"
    check_memory(who, memory_needed(chosen, shapes, dtype), device, "name fewer with --only")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    return Plan(
        shapes,
        chosen,
        device,
        dtype,
        config.spectrum,
        config.rounds,
        config.seconds,
        config.first_steps,
        not config.skip_peak,
        config.seed,
        config.limit,
    )


def carry_out(
    console: Console,
    out: Path,
    work: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], Table],
    said: Callable[[dict[str, Any]], Iterable[str]] = lambda result: (),
    plot: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Call ``work``, write its result to ``out``, print its ``table`` and the sentences of ``said``, and return it.

    With ``plot``, also write a picture beside the file. That both can be written is checked before the work.
    """
    claim(out)
    picture = out.with_suffix(".png")
    if plot:
        claim(picture)
    result = work()
    write_json(out, result)
    if plot:
        plot(result, picture)
    console.print(table(result))
    for sentence in said(result):
        console.print(sentence)
    console.print(f"All times: {out}{f'; the plot: {picture}' if plot else ''}", highlight=False, soft_wrap=True)
    return result


def with_load(shapes: ModelShapes, about: dict[str, Any], rows: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the contents of a file: the conditions, ``about``, and the contestants' ``rows``, with the load around."""
    head = {"model": shapes.name, "layers": shapes.layers, **describe(), **about, "load_before": load()}
    contestants = rows()
    return {**head, "load_after": load(), "contestants": contestants}


def watched(console: Console, work: Callable[[Callable[[str, float], None]], dict[str, Any]]) -> dict[str, Any]:
    """Call ``work`` and return its result. Show its progress as a bar on a terminal, as lines elsewhere."""
    if not console.is_terminal:
        return work(_lines())
    columns = TextColumn("{task.description:28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        return work(lambda what, share: bar.update(task, description=what, completed=share))


def _lines() -> Callable[[str, float], None]:
    """Return a function that prints progress on stderr, not more often than every `SAID_EVERY` seconds."""
    last = -SAID_EVERY

    def say(what: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= SAID_EVERY:
            last = time.monotonic()
            print(f"{share:4.0%}  {what}", file=sys.stderr, flush=True)

    return say
