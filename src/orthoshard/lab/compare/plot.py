"""One picture: the loss of every rival at its best learning rates, and how much either rate matters to each.

May import ``orthoshard.lab.compare`` and `canvas`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthoshard.lab import canvas
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.job import Outcome
from orthoshard.lab.compare.table import Row


def plot(made: Sequence[Row], outcomes: Mapping[str, Mapping[Spot, Outcome]], first_seed: int, path: Path) -> None:
    """Write a PNG. The curves are those of the first seed; a learning rate that diverged is a cross at the top."""
    canvas.png(lambda figure: _draw(figure, made, outcomes, first_seed), path, 17, 4.8)


def _draw(figure: Any, made: Sequence[Row], outcomes: Mapping[str, Mapping[Spot, Outcome]], first_seed: int) -> None:
    curves, lr, scalar_lr = figure.subplots(1, 3)
    finals: list[float] = []
    starts: list[float] = []
    for k, row in enumerate(made):
        for run in outcomes[row.label].values():
            if (row.lr, row.scalar_lr, first_seed) == (run.lr, run.scalar_lr, run.seed):
                points = [(step, loss) for step, loss in run.validations if math.isfinite(loss)]
                curves.plot(
                    *zip(*points, strict=True), _style(k), color=_color(k), label=f"{row.label}, lr {row.lr:.3g}"
                )
                finals.append(min(loss for _, loss in points))
                starts.extend(loss for step, loss in points if step >= run.steps / 10)
    if finals:
        # From a tenth of the run on: the fall of the first steps would flatten all that differs.
        low, high = min(finals), max(starts, default=max(finals))
        curves.set_ylim(low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1))
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss (nats a token)")
    curves.set_title("at its best learning rates")
    _sensitivity(lr, {row.label: row.tried for row in made}, "lr, of matrices (x: diverged)")
    _sensitivity(scalar_lr, {row.label: row.scalar_tried for row in made}, "scalar lr, of all else, at the best lr")
    for axes in (curves, lr, scalar_lr):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


def _color(k: int) -> str:
    return f"C{k % 10}"


def _style(k: int) -> str:
    return "-" if k < 10 else "--"


def _sensitivity(axes: Any, tried: Mapping[str, Mapping[float, float | None]], title: str) -> None:
    for k, (label, losses) in enumerate(tried.items()):
        known = [(rate, loss) for rate, loss in losses.items() if loss is not None]
        if known:
            axes.plot(*zip(*known, strict=True), f"o{_style(k)}", color=_color(k), label=label, markersize=4)
    top = axes.get_ylim()[1]
    for k, (label, losses) in enumerate(tried.items()):
        bad = [rate for rate, loss in losses.items() if loss is None]
        if bad:
            told = None if len(bad) < len(losses) else f"{label}, diverged"
            axes.plot(bad, [top] * len(bad), "x", color=_color(k), clip_on=False, label=told)
    canvas.rates(axes)
    axes.set_ylabel("best validation loss")
    axes.set_title(title)
