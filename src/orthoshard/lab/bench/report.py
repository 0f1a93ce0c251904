"""From measurements to the JSON file, with medians and their ratios. May import ``orthoshard.lab.bench``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orthoshard.lab.bench.tables import YARDSTICKS
from orthoshard.lab.bench.timing import Spread


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one contestant. A floor has ``flops`` and no state; an optimizer has state and no ``flops``."""

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
    """Return the ratios of a contestant's time to its floor, its rival, fused AdamW and both Muons, if they were timed.

    These are ratios of medians or, with ``least``, of the shortest times, which a disturbed machine changes less.
    """

    def time(row: Measured) -> float:
        return row.steps.least if least else row.steps.median

    row = rows[name]
    own = {"floor": row.floor, "rival": row.rival}
    against = {**{label: other for label, other in own.items() if other}, **{name: name for name in YARDSTICKS}}
    known = {label: other for label, other in against.items() if other in rows and other != name}
    return {label: time(row) / time(rows[other]) for label, other in known.items()}


def to_json(measured: Sequence[Measured], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of the file: ``about`` and, by contestant, every measured time and the derived figures."""
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
