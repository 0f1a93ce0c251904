"""``orthoshard bench --self-test``: runs one section after the other, prints a line for each check, and writes a file.

May import torch and ``orthoshard``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from orthoshard.lab.bench.checks import find_device
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.environment import describe
from orthoshard.lab.bench.files import claim, write_json
from orthoshard.lab.bench.selftest.correct import correct
from orthoshard.lab.bench.selftest.graphs import graphs
from orthoshard.lab.bench.selftest.layouts import layouts, rank
from orthoshard.lab.bench.selftest.memory import memory
from orthoshard.lab.bench.selftest.orthonormal import orthonormal, tf32
from orthoshard.lab.bench.selftest.rounding import rounding
from orthoshard.lab.bench.selftest.rows import Check, Row, absent, run_section
from orthoshard.lab.bench.selftest.syncs import syncs

Section = Callable[[torch.device], Iterable[Check]]
SECTIONS: Mapping[str, Section] = {
    "correct": correct,
    "rounding": rounding,
    "orthonormal": orthonormal,
    "tf32": tf32,
    "syncs": syncs,
    "graphs": graphs,
    "memory": memory,
    "layouts": layouts,
}
OF_CUDA = ("syncs", "graphs", "memory")


class Table:
    """Prints each row and keeps the file up to date.

    The name of a check is printed before it is made. So if a check hangs or ends the process, the reader sees which.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.rows: list[Row] = []
        self._out, self._about = out, about
        print(", ".join(f"{key} {about[key]}" for key in ("torch", "cuda", "triton", "device")))
        print(f"{'section':12} {'check':54}{'figure':>10}{'limit':>10}  result", flush=True)

    def begins(self, section: str, what: str) -> None:
        print(f"{section:12} {what:54}", end="", flush=True)

    def ends(self, row: Row) -> None:
        numbers = "".join(f"{'' if number is None else f'{number:.2g}':>10}" for number in (row.figure, row.limit))
        print(f"{numbers}  {row.result}{': ' if row.reason else ''}{row.reason}", flush=True)
        self.rows.append(row)
        write_json(self._out, {**self._about, **self.counts, "rows": [row.as_json() for row in self.rows]})

    @property
    def counts(self) -> dict[str, int]:
        results = [row.result for row in self.rows]
        return {"ok": results.count("ok"), "failed": results.count("FAIL"), "skipped": results.count("skipped")}


def run_self_test(config: BenchConfig, folder: Path) -> int:
    """Print the table, write the file, and return 1 if a check failed, else 0.

    Raises ValueError for bad flags, before any check.
    """
    sections, device = chosen(config.only), find_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if rank():  # torchrun's rank: all ranks check the layouts, rank 0 alone checks the rest
        if "layouts" in sections:
            for _ in run_section("layouts", partial(layouts, device), lambda *_: None):
                pass  # rank 0 prints the results
        return 0
    out = config.out or folder / f"self-test-{device.type}.json"
    claim(out)
    table, began = Table(out, {**describe(device), **versions(device)}), time.perf_counter()
    for name, section in sections.items():
        for row in run_section(name, partial(checks_of, name, section, device), table.begins):
            table.ends(row)
    spent, counts = time.perf_counter() - began, table.counts
    print(", ".join(f"{count} {result}" for result, count in counts.items()), f"in {spent:.0f} s; to attach: {out}")
    return 1 if counts["failed"] else 0


def chosen(patterns: Sequence[str]) -> dict[str, Section]:
    """Return the sections that match the names or patterns, or all. Raises ValueError if one matches none."""
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


def versions(device: torch.device) -> dict[str, Any]:
    """Return the versions that the file lists in addition to those of every benchmark."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"cuda": torch.version.cuda, "triton": triton, "capability": capability, "device": name}
