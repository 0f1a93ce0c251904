"""A plot of measured and predicted steps over a slow link. May import `canvas`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthoshard.lab import canvas


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG to ``path``: lines are predictions, dots are measurements with bars for their spread."""

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
