"""How all pictures are drawn: as PNG, or as SVG whose bytes depend on the data alone; and the style that they share.

May import matplotlib.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

# Okabe and Ito's palette (jfly.uni-koeln.de/color, 2008), for readers of every colour vision; then three darker ones.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C8D", "#8C564B", "#7F7F7F")
MARKERS = "osD^vP*X<>"
FEW, APART = 7, 1.5  # tick labels do not overlap if there are at most so many, each above the last by this factor


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line style of each label, for use in every panel of a figure."""
    found: dict[str, dict[str, Any]] = {}
    for k, label in enumerate(dict.fromkeys(labels)):
        line = ("-", "--", ":")[k // len(COLORS) % 3]
        found[label] = {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": line}
    return found


def svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    """Return the SVG text of a matplotlib figure, ``width`` x ``height`` inches, that ``draw`` fills."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "orthoshard", "svg.fonttype": "none", "font.size": 9, "legend.fontsize": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def png(draw: Callable[[Any], None], path: Path, width: float, height: float) -> None:
    """Write a matplotlib figure, ``width`` x ``height`` inches, that ``draw`` fills, to ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=120)


def panels(figure: Any, count: int, most: int = 3, share_y: bool = False) -> list[Any]:
    """Add ``count`` axes to ``figure``, at most ``most`` in a row, and return them."""
    columns = min(most, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, sharey=share_y).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return grid[:count]


def size(count: int, most: int = 3) -> tuple[float, float]:
    """Return width and height in inches of a figure of ``count`` panels, at most ``most`` in a row."""
    columns = min(most, count)
    return 4.4 * columns, 3.4 * -(-count // columns)


def logarithmic(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times each power of ten, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def rates(axes: Any, tried: Sequence[float] = ()) -> None:
    """Make the x axis a logarithmic one of learning rates: ticks at those tried if they fit, else at round numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    if tried:
        if len(tried) <= FEW and all(high / low > APART for low, high in pairwise(tried)):
            axes.xaxis.set_major_locator(FixedLocator(list(tried)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")


def measured(axes: Any, x: Sequence[float], times: Sequence[Sequence[float]], color: int, label: str) -> None:
    """Draw a dot at the median of the times at each x, with a bar from the shortest to the longest."""
    medians = [statistics.median(each) for each in times]
    below = [y - min(each) for y, each in zip(medians, times, strict=True)]
    above = [max(each) - y for y, each in zip(medians, times, strict=True)]
    axes.errorbar(x, medians, (below, above), fmt="o", color=f"C{color}", capsize=3, label=label)


def beside_predictions(figure: Any, ticks: Sequence[float]) -> Any:
    """Add axes for measurements beside predictions, both logarithmic, with ``ticks`` along x, and return them."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.set_xticks(ticks)
    axes.grid(which="both", alpha=0.25)
    return axes
