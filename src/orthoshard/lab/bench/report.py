"""Measurements to rows: medians, their ratios, a table for the screen and a dictionary for the JSON file.

May import rich and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from orthoshard.lab.bench.files import size
from orthoshard.lab.bench.timing import Spread
from orthoshard.lab.tables import sheet

YARDSTICKS = ("adamw-fused", "torch-muon", "muon")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one contestant. A floor has ``flops`` and no state; an optimizer the reverse."""

    name: str
    steps: Spread
    first: tuple[float, ...] = ()
    floor: str | None = None
    flops: int | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    rival: str | None = None
    weights_bytes: int | None = None


def ratios(rows: Mapping[str, Measured], name: str, least: bool = False) -> dict[str, float]:
    """The time of a contestant over its floor, its rival, fused AdamW and both Muons, as far as they were timed.

    Of medians, or (``least``) of the shortest times, which a disturbed machine changes less.
    """

    def time(row: Measured) -> float:
        return row.steps.least if least else row.steps.median

    row = rows[name]
    own = {"floor": row.floor, "rival": row.rival}
    against = {**{label: other for label, other in own.items() if other}, **{name: name for name in YARDSTICKS}}
    known = {label: other for label, other in against.items() if other in rows and other != name}
    return {label: time(row) / time(rows[other]) for label, other in known.items()}


def to_json(measured: Sequence[Measured], about: Mapping[str, Any]) -> dict[str, Any]:
    """The file's contents: ``about`` and, by contestant, every measured time and all that follows."""
    rows = {row.name: row for row in measured}
    contestants: dict[str, Any] = {}
    for name, row in rows.items():
        first = statistics.median(row.first) if row.first else None
        contestants[name] = {
            "median_ms": row.steps.median,
            "min_ms": row.steps.least,
            "max_ms": row.steps.most,
            "rounds": len(row.steps.times),
            "ratios_of_medians": ratios(rows, name),
            "ratios_of_minima": ratios(rows, name, least=True),
            "floor": row.floor,
            "rival": row.rival,
            "flops": row.flops,
            "gflops_per_second": row.flops / row.steps.median / 1e6 if row.flops else None,
            "first_ms": first,
            "first_over_median": first / row.steps.median if first else None,
            "state_bytes": row.state_bytes,
            "peak_bytes": row.peak_bytes,
            "peak_over_weights": _share(row.peak_bytes, row.weights_bytes),
            "times_ms": list(row.steps.times),
            "first_times_ms": list(row.first),
        }
    return {**about, "contestants": contestants}


def _share(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(result: Mapping[str, Any]) -> Table:
    """The same on screen: one row a contestant, times in milliseconds, ratios of medians."""
    title = f"one optimizer step, {result['model']['name']}, {result['dtype']}, {result['device']}"
    against = ("over\nfloor", "over\nAdamW", "over torch\nMuon", "over\nours", "over\nrival")
    headings = ("", "median\nms", "min", "max", *against, "first\n/ later", "state", "peak /\nweights")
    drawn = sheet(headings, title=title)
    for name, row in result["contestants"].items():
        of = row["ratios_of_medians"]
        cells = [_milliseconds(row[key]) for key in ("median_ms", "min_ms", "max_ms")]
        cells += [f"{of[key]:.2f}" if key in of else "" for key in ("floor", *YARDSTICKS, "rival")]
        cells.append(f"{row['first_over_median']:.2f}" if row["first_over_median"] else "")
        share = row["peak_over_weights"]
        cells += [size(row["state_bytes"]), "" if share is None else f"{share:.3f}"]
        drawn.add_row(name, *cells, style="dim" if row["flops"] else None)
    return drawn
