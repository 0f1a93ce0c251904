"""``orthoshard bench --self-test``: its sections one after the other, a line for each check, a file at the end.

May import torch and ``orthoshard``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from orthoshard.bench.checks import find_device
from orthoshard.bench.config import BenchConfig
from orthoshard.bench.environment import describe
from orthoshard.bench.files import claim, write_json
from orthoshard.bench.selftest.correct import correct
from orthoshard.bench.selftest.graphs import graphs
from orthoshard.bench.selftest.memory import memory
from orthoshard.bench.selftest.orthonormal import orthonormal, tf32
from orthoshard.bench.selftest.rounding import rounding
from orthoshard.bench.selftest.rows import HEADING, Check, Row, absent, run_section
from orthoshard.bench.selftest.syncs import syncs

Section = Callable[[torch.device], Iterable[Check]]
SECTIONS: Mapping[str, Section] = {
    "correct": correct,
    "rounding": rounding,
    "orthonormal": orthonormal,
    "tf32": tf32,
    "syncs": syncs,
    "graphs": graphs,
    "memory": memory,
}
OF_CUDA = ("syncs", "graphs", "memory")


def run_self_test(config: BenchConfig, folder: Path) -> int:
    """Print the table and write the file. Returns 1 where a check failed, else 0. Raises ValueError, before anything is
    run, for flags that cannot be."""
    sections, device = chosen(config.only), find_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    out = config.out or folder / f"self-test-{device.type}.json"
    claim(out)
    about, rows = {**describe(device), **versions(device)}, list[Row]()
    print(", ".join(f"{key} {about[key]}" for key in ("torch", "cuda", "triton", "device")))
    print(HEADING, flush=True)

    def say(row: Row) -> None:
        rows.append(row)
        print(row.line(), flush=True)

    began = time.perf_counter()
    for name, section in sections.items():
        run_section(name, lambda section=section, name=name: checks_of(name, section, device), say)
        # after each section, for a fault of a kernel may end the process
        write_json(out, {**about, **summary(rows), "rows": [row.as_json() for row in rows]})
    counts = summary(rows)
    print(
        f"{counts['ok']} ok, {counts['failed']} failed, {counts['skipped']} skipped "
        f"in {time.perf_counter() - began:.0f} s; to attach to an issue: {out}"
    )
    return 1 if counts["failed"] else 0


def chosen(patterns: Sequence[str]) -> dict[str, Section]:
    """The sections of these names or patterns, or all. Raises ValueError for one that names none."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in SECTIONS):
            raise ValueError(f"--only {pattern}: --self-test has no such section; it has {', '.join(SECTIONS)}.")
    return {
        name: section
        for name, section in SECTIONS.items()
        if not patterns or any(fnmatch(name, pattern) for pattern in patterns)
    }


def checks_of(name: str, section: Section, device: torch.device) -> Iterable[Check]:
    if name in OF_CUDA and device.type != "cuda":
        return [absent("all", f"needs CUDA, and this is {device}")]
    return section(device)


def summary(rows: Sequence[Row]) -> dict[str, int]:
    results = [row.result for row in rows]
    return {"ok": results.count("ok"), "failed": results.count("FAIL"), "skipped": results.count("skipped")}


def versions(device: torch.device) -> dict[str, Any]:
    """Beside those of every benchmark."""
    try:
        import triton

        has: str | None = str(triton.__version__)
    except ImportError:
        has = None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"cuda": torch.version.cuda, "triton": has, "capability": capability, "device": name}
