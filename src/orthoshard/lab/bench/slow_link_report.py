"""Steps over a slow link as a table and a picture, measured beside predicted.

May import rich and `canvas`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from orthoshard.lab import canvas
from orthoshard.lab.tables import sheet


def table(result: Mapping[str, Any]) -> Table:
    """A row for each bandwidth and rival; steps bound by the machine and not by the link are marked."""
    title = f"one step of {result['model']}, {result['replicas']} replicas over a slow link"
    caption = "*: moving the data took this machine longer than the link would"
    headings = ("Mbit/s", "", "MB sent", "predicted, s", "measured, s", "ratio", "gradients / this")
    drawn = sheet(headings, left=(1,), title=title, caption=caption)
    rows = result["contestants"]
    for number, mbit in enumerate(result["bandwidths_mbit"]):
        for name, row in rows.items():
            point = row["points"][number]
            full = rows[row["against"]]["points"][number]["measured_ms"] if row["against"] else None
            seconds = [f"{point[what] / 1e3:.3f}" for what in ("predicted_ms", "measured_ms")]
            ratio = f"{point['ratio']:.2f}{'*' if point['bound_by'] == 'transport' else ' '}"
            gain = f"{full / point['measured_ms']:.1f}" if full else ""
            drawn.add_row(f"{mbit:g}", name, f"{row['bytes'] / 1e6:.1f}", *seconds, ratio, gain)
    return drawn


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: lines are predicted, dots measured, bars their spread."""

    def fill(figure: Any) -> None:
        axes = canvas.beside_predictions(figure, result["bandwidths_mbit"])
        for k, (name, row) in enumerate(result["contestants"].items()):
            mbit = [point["mbit"] for point in row["points"]]
            line = [point["predicted_ms"] / 1e3 for point in row["points"]]
            axes.plot(mbit, line, color=f"C{k}", label=f"{name}: predicted from {row['bytes'] / 1e6:.0f} MB")
            times = [[milliseconds / 1e3 for milliseconds in point["times_ms"]] for point in row["points"]]
            canvas.measured(axes, mbit, times, k, f"{name}: measured")
        axes.set_xlabel("bandwidth of each replica, each way (Mbit/s)")
        axes.set_ylabel("one optimizer step (s)")
        axes.set_title(f"matrices of {result['model']}, {result['replicas']} replicas on {result['cores']} cores")
        axes.legend(fontsize=8)

    canvas.png(fill, path, 7.5, 5)
