"""Measured step times beside what flops and bytes predict, with rates that come from one point, the anchor:

    predicted(x) = flops(x) / rate + bytes(x) / bandwidth + matrices(x) · calls

Bandwidth and calls are measured; the rate is what the anchor's step leaves for its flops beyond these. So the anchor is
met exactly, and every other point is a prediction. Over layers the times should also lie on a line a + b x, fitted so
that the squared relative deviations are least. May import torch and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orthoshard.budget import Cost
from orthoshard.lab.bench.timing import Spread

# What the cost model and the line are held to, relative.
PREDICTED_WITHIN, LINEAR_WITHIN = 0.25, 0.10


@dataclass(frozen=True, slots=True)
class Point:
    """One optimizer: its name and place along what grows, its matrices, its times, what the cost model says of it."""

    name: str
    value: float
    matrices: int
    times: Spread
    cost: Cost


def results(points: Sequence[Point], anchor: str, bytes_per_ms: float, calls_ms: float) -> dict[str, Any]:
    """The rates, the line, the largest deviations, and a row for each point. ``calls_ms``: of one matrix."""
    known = next(point for point in points if point.name == anchor)
    rates = _rates(known, bytes_per_ms, calls_ms)
    constant, slope = fit_line([point.value for point in points], [point.times.median for point in points])
    rows: list[dict[str, Any]] = []
    for point in points:
        predicted = rates.predict(point)
        rows.append(
            {
                "point": point.name,
                "value": point.value,
                "matrices": point.matrices,
                "flops": point.cost.flops,
                "bytes": point.cost.memory,
                "predicted_ms": predicted,
                "calls_ms": rates.ms_per_matrix * point.matrices,
                "measured_ms": point.times.median,
                "min_ms": point.times.least,
                "measured_over_predicted": point.times.median / predicted,
                "measured_over_line": point.times.median / (constant + slope * point.value),
                "times_ms": list(point.times.times),
            }
        )
    bare = _rates(known, bytes_per_ms, 0.0)
    return {
        "anchor": anchor,
        "gigabytes_per_second": 1e-6 / rates.ms_per_byte if rates.ms_per_byte else None,
        "gflops_per_second": 1e-6 / rates.ms_per_flop if rates.ms_per_flop else None,
        "calls_ms_per_matrix": rates.ms_per_matrix,
        "line_ms": {"constant": constant, "slope": slope},
        "worst_prediction": worst(rows, "measured_over_predicted"),
        "worst_prediction_without_calls": max(abs(point.times.median / bare.predict(point) - 1) for point in points),
        "worst_on_line": worst(rows, "measured_over_line"),
        "points": rows,
    }


@dataclass(frozen=True, slots=True)
class Rates:
    """Milliseconds of one flop, one byte, and the calls for one matrix."""

    ms_per_flop: float
    ms_per_byte: float
    ms_per_matrix: float

    def predict(self, point: Point) -> float:
        cost = point.cost
        return cost.flops * self.ms_per_flop + cost.memory * self.ms_per_byte + point.matrices * self.ms_per_matrix


def _rates(known: Point, bytes_per_ms: float, calls_ms: float) -> Rates:
    """Those with which the known point is met exactly."""
    left = known.times.median - calls_ms * known.matrices
    beyond = left - known.cost.memory / bytes_per_ms
    if beyond >= 0:
        return Rates(beyond / known.cost.flops, 1 / bytes_per_ms, calls_ms)
    if left > 0:  # the bytes alone would take longer than the step did: it is all bytes then, at its own rate
        return Rates(0.0, left / known.cost.memory, calls_ms)
    return Rates(0.0, 0.0, known.times.median / known.matrices)  # and here the calls


def worst(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The largest relative deviation."""
    return max(abs(row[key] - 1) for row in rows)


def fit_line(x: Sequence[float], t: Sequence[float]) -> tuple[float, float]:
    """(a, b) that make the sum of ((a + b x) / t - 1)² least."""
    ones, values = torch.tensor([[1.0] * len(x), list(x)], dtype=torch.float64) / torch.tensor(t, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.stack((ones, values), 1), torch.ones(len(x), 1, dtype=torch.float64)).solution
    a, b = solution.flatten().tolist()
    return a, b
