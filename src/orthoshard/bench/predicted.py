"""Measured step times beside what flops and bytes predict, with rates that come from one point, the anchor:

    predicted(x) = flops(x) / rate + bytes(x) / bandwidth

The bandwidth is measured; the rate is what the anchor's step leaves for its flops beyond its bytes. So the anchor is
met exactly, and every other point is a prediction. Over layers the times should also lie on a line a + b x, fitted so
that the squared relative deviations are least. May import torch and ``orthoshard.bench``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orthoshard.bench.timing import Spread
from orthoshard.budget import Cost

# What the cost model and the line are held to, relative.
PREDICTED_WITHIN, LINEAR_WITHIN = 0.25, 0.10


@dataclass(frozen=True, slots=True)
class Point:
    """One optimizer: its name and place along what grows, its times, what the cost model says of it."""

    name: str
    value: float
    times: Spread
    cost: Cost


def results(points: Sequence[Point], anchor: str, bytes_per_ms: float) -> dict[str, Any]:
    """The rates, the line, the largest deviations, and a row for each point."""
    known = next(point for point in points if point.name == anchor)
    beyond = known.times.median - known.cost.memory / bytes_per_ms
    if beyond <= 0:  # the bytes alone would take longer than the step did: it is all bytes then, at its own rate
        beyond, bytes_per_ms = 0.0, known.cost.memory / known.times.median
    ms_per_flop = beyond / known.cost.flops
    constant, slope = fit_line([point.value for point in points], [point.times.median for point in points])
    rows: list[dict[str, Any]] = []
    for point in points:
        predicted = point.cost.memory / bytes_per_ms + point.cost.flops * ms_per_flop
        rows.append(
            {
                "point": point.name,
                "value": point.value,
                "flops": point.cost.flops,
                "bytes": point.cost.memory,
                "predicted_ms": predicted,
                "measured_ms": point.times.median,
                "min_ms": point.times.least,
                "measured_over_predicted": point.times.median / predicted,
                "measured_over_line": point.times.median / (constant + slope * point.value),
                "times_ms": list(point.times.times),
            }
        )
    return {
        "anchor": anchor,
        "gigabytes_per_second": bytes_per_ms / 1e6,
        "gflops_per_second": 1e-6 / ms_per_flop if ms_per_flop else None,
        "line_ms": {"constant": constant, "slope": slope},
        "worst_prediction": worst(rows, "measured_over_predicted"),
        "worst_on_line": worst(rows, "measured_over_line"),
        "points": rows,
    }


def worst(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The largest relative deviation."""
    return max(abs(row[key] - 1) for row in rows)


def fit_line(x: Sequence[float], t: Sequence[float]) -> tuple[float, float]:
    """(a, b) that make the sum of ((a + b x) / t - 1)² least."""
    ones, values = torch.tensor([[1.0] * len(x), list(x)], dtype=torch.float64) / torch.tensor(t, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.stack((ones, values), 1), torch.ones(len(x), 1, dtype=torch.float64)).solution
    a, b = solution.flatten().tolist()
    return a, b
