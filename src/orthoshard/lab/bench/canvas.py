"""Pictures of measurements beside predictions, both axes logarithmic: what all of the bench's have in common.

May import matplotlib.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def log_log(ticks: Sequence[float]) -> Any:
    """Empty axes with plain numbers along them, and those ticks across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks)
    return axes


def dots(axes: Any, x: Sequence[float], times: Sequence[Sequence[float]], color: int, label: str) -> None:
    """The median of the times at each x, with bars from the shortest to the longest."""
    medians = [statistics.median(each) for each in times]
    below = [y - min(each) for y, each in zip(medians, times, strict=True)]
    above = [max(each) - y for y, each in zip(medians, times, strict=True)]
    axes.errorbar(x, medians, (below, above), fmt="o", color=f"C{color}", capsize=3, label=label)


def finish(axes: Any, path: Path) -> None:
    """Writes a PNG."""
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    axes.figure.savefig(path, dpi=120)
