"""One picture: the loss of every rival at its best learning rate, and how much the learning rate matters to each.

May import ``orthoshard.compare`` and matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from orthoshard.compare.job import Outcome
from orthoshard.compare.sweep import Spot
from orthoshard.compare.table import Row


def plot(made: Sequence[Row], outcomes: Mapping[str, Mapping[Spot, Outcome]], first_seed: int, path: Path) -> None:
    """Writes a PNG. The curves are those of the first seed; a learning rate that diverged is a cross at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, sensitivity = figure.subplots(1, 2)
    finals: list[float] = []
    starts: list[float] = []
    for k, row in enumerate(made):
        color = f"C{k % 10}"
        style = "-" if k < 10 else "--"
        for run in outcomes[row.label].values():
            if row.lr == run.lr and run.seed == first_seed:
                points = [(step, loss) for step, loss in run.validations if math.isfinite(loss)]
                curves.plot(*zip(*points, strict=True), style, color=color, label=f"{row.label}, lr {row.lr:.3g}")
                finals.append(min(loss for _, loss in points))
                starts.extend(loss for step, loss in points if step >= run.steps / 10)
        known = [(lr, loss) for lr, loss in row.tried.items() if loss is not None]
        if known:
            sensitivity.plot(*zip(*known, strict=True), f"o{style}", color=color, label=row.label, markersize=4)
    if finals:
        # From a tenth of the run on: the fall of the first steps would flatten all that differs.
        low, high = min(finals), max(starts, default=max(finals))
        curves.set_ylim(low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1))
    top = sensitivity.get_ylim()[1]
    for k, row in enumerate(made):
        bad = [lr for lr, loss in row.tried.items() if loss is None]
        if not bad:
            continue
        label = None if any(loss is not None for loss in row.tried.values()) else f"{row.label}, diverged"
        sensitivity.plot(bad, [top] * len(bad), "x", color=f"C{k % 10}", clip_on=False, label=label)
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss (nats a token)")
    curves.set_title("at its best learning rate")
    sensitivity.set_xscale("log")
    sensitivity.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sensitivity.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:g}"))
    sensitivity.xaxis.set_minor_formatter(NullFormatter())
    sensitivity.set_xlabel("learning rate")
    sensitivity.set_ylabel("best validation loss")
    sensitivity.set_title("sensitivity to the learning rate (x: diverged)")
    for axes in (curves, sensitivity):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
