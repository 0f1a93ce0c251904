"""Steps over a slow link as a table and a picture, measured beside predicted.

May import rich and matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


def table(result: Mapping[str, Any]) -> Table:
    """A row for each bandwidth and rival; steps bound by the machine and not by the link are marked."""
    title = f"one step of {result['model']}, {result['replicas']} replicas over a slow link"
    caption = "*: moving the data took this machine longer than the link would"
    drawn = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for heading in ("Mbit/s", "", "MB sent", "predicted, s", "measured, s", "ratio", "gradients / this"):
        drawn.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for k, (name, row) in enumerate(result["contestants"].items()):
        mbit = [point["mbit"] for point in row["points"]]
        line = [point["predicted_ms"] / 1e3 for point in row["points"]]
        axes.plot(mbit, line, color=f"C{k}", label=f"{name}: predicted from {row['bytes'] / 1e6:.0f} MB")
        seconds = [point["measured_ms"] / 1e3 for point in row["points"]]
        below = [y - min(point["times_ms"]) / 1e3 for y, point in zip(seconds, row["points"], strict=True)]
        above = [max(point["times_ms"]) / 1e3 - y for y, point in zip(seconds, row["points"], strict=True)]
        axes.errorbar(mbit, seconds, (below, above), fmt="o", color=f"C{k}", capsize=3, label=f"{name}: measured")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks(result["bandwidths_mbit"])
    axes.set_xlabel("bandwidth of each replica, each way (Mbit/s)")
    axes.set_ylabel("one optimizer step (s)")
    axes.set_title(f"matrices of {result['model']}, {result['replicas']} replicas on {result['cores']} cores")
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
