"""Growth of a step as a table and a picture, measured beside predicted.

May import rich and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from orthoshard.lab import canvas
from orthoshard.lab.bench.predicted import LINEAR_WITHIN, PREDICTED_WITHIN
from orthoshard.lab.tables import sheet

UNITS = {"layers": "layers", "width": "width", "rank": "rank fraction"}


def subject(result: Mapping[str, Any]) -> str:
    rank = f" at rank {result['rank']}" if result["rank"] else ""
    return f"{result['rule']}{rank}, matrices of {result['model']}, {result['dtype']}"


def table(result: Mapping[str, Any]) -> Table:
    """A row a point; the anchor, whose prediction is exact by construction, is marked."""
    title = f"one step against {UNITS[result['growth']]}: {subject(result)}"
    caption = "*: rates are taken from this point"
    linear = result["growth"] == "layers"
    headings = (UNITS[result["growth"]], "GFLOP", "GB moved", "calls, ms", "predicted, ms", "measured, ms", "ratio")
    drawn = sheet((*headings, *["over the line"] * linear), left=(), title=title, caption=caption)
    for row in result["points"]:
        mark = "*" if row["point"] == result["anchor"] else " "
        cells = [f"{row['flops'] / 1e9:.3g}", f"{row['bytes'] / 1e9:.3g}"]
        cells += [f"{row[key]:.4g}" for key in ("calls_ms", "predicted_ms", "measured_ms")]
        cells.append(f"{row['measured_over_predicted']:.2f}{mark}")
        drawn.add_row(row["point"], *cells, *((f"{row['measured_over_line']:.2f}",) if linear else ()))
    return drawn


def verdict(result: Mapping[str, Any]) -> list[str]:
    """The largest deviations beside what they are held to, in a sentence."""
    off = (
        f"The worst prediction is off by {result['worst_prediction']:.0%} (held to {PREDICTED_WITHIN:.0%}), without "
        f"calls by {result['worst_prediction_without_calls']:.0%}"
    )
    if result["growth"] == "layers":
        off += f"; the farthest point from the line {result['worst_on_line']:.0%} (held to {LINEAR_WITHIN:.0%})"
    return [f"{off}."]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: the line is predicted, dots measured, bars their spread."""

    def fill(figure: Any) -> None:
        points = result["points"]
        x = [row["value"] for row in points]
        axes = canvas.beside_predictions(figure, x)
        axes.set_xticklabels([row["point"] for row in points])
        axes.plot(x, [row["predicted_ms"] for row in points], color="C0", label=f"predicted from {result['anchor']}")
        canvas.measured(axes, x, [row["times_ms"] for row in points], 1, "measured")
        axes.set_xlabel(UNITS[result["growth"]])
        axes.set_ylabel("one optimizer step (ms)")
        axes.set_title(f"{subject(result)}, {result['threads']} threads")
        axes.legend(fontsize=8)

    canvas.png(fill, path, 7.5, 5)
