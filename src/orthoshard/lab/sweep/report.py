"""Trials to a table, a heat map, JSON, and the best as flags for ``orthoshard train``.

May import ``orthoshard.lab.sweep``, ``orthoshard.lab.compare``, ``orthoshard.lab.train``, rich and matplotlib.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from orthoshard.lab.compare.comparison import differences
from orthoshard.lab.sweep.study import Found
from orthoshard.lab.train.config import TrainConfig, to_dict

# A column of the heat map: learning rates within a factor of 2.
COLUMN = 2.0
# Settings whose flag is not their name.
FLAGS = {"model.name": "model", "optimizer.name": "optimizer"}


def flags(config: TrainConfig, base: TrainConfig, preset: str) -> str:
    """The command that trains once more what ``config`` says, ``base`` being the preset's settings."""
    words = ["orthoshard", "train", *(["--preset", preset] if preset != "default" else [])]
    words += ["--optimizer", config.optimizer.name]
    for name, here in _settings(to_dict(config), to_dict(base)):
        if name != "optimizer.name":
            words.append(f"--{FLAGS.get(name, name.rpartition('.')[2]).replace('_', '-')}")
            words.append(str(here))
    return shlex.join(words)


def _settings(here: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What has to be said: what differs from the preset in data, model and schedule, and all of the optimizer."""
    for part in ("data", "model", "schedule"):
        for name, value, _ in differences(here[part], base[part], f"{part}."):
            yield name, value
    for name, value in here["optimizer"].items():
        if value is not None and value != [] and value != ():
            yield f"optimizer.{name}", value
    if here["seed"] != base["seed"]:
        yield "seed", here["seed"]


def table(found: Sequence[Found], most: int = 12) -> Table:
    """The best trials, one a line."""
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("trial", "optimizer", "lr", "scalar lr", "rank fraction", "momentum", "weight decay", "loss", ""):
        drawn.add_column(heading, justify="left" if heading in ("optimizer", "") else "right", no_wrap=True)
    for place, row in enumerate(found[:most]):
        o = row.optimizer
        numbers = [_short(o.lr), _short(o.scalar_lr), _fraction(o.rank_fraction)]
        numbers += [_short(o.momentum), _short(o.weight_decay)]
        loss = "" if row.loss is None or math.isinf(row.loss) else f"{row.loss:.4f}"
        status = "" if row.status == "finished" else f"{row.status} at step {row.step}"
        best = place == 0 and row.status == "finished"
        drawn.add_row(str(row.number), o.name, *numbers, loss, status, style="bold" if best else None)
    return drawn


def to_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    return [
        {
            "trial": row.number,
            "status": row.status,
            "loss": row.loss if row.loss is not None and math.isfinite(row.loss) else None,
            "step": row.step,
            "optimizer": {key: value for key, value in to_dict(row.optimizer).items() if value is not None},
        }
        for row in found
    ]


def heat_map(found: Sequence[Found], path: Path) -> None:
    """One panel an optimizer: the best loss by learning rate and rank fraction, or by learning rate alone where there
    is but one rank or none. Trials are dots, pruned ones hollow, diverged ones crosses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = sorted({row.optimizer.name for row in found})
    figure = Figure(figsize=(1 + 5.5 * max(1, len(names)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    losses = [row.loss for row in found if row.status == "finished" and row.loss is not None]
    panels = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        mine = [row for row in found if row.optimizer.name == name]
        fractions = sorted({row.optimizer.rank_fraction for row in mine if row.optimizer.rank_fraction is not None})
        if len(fractions) > 1:
            shown = _cells(axes, mine, fractions, losses)
            if shown is not None:
                figure.colorbar(shown, ax=axes, label="best validation loss (nats a token)")
        else:
            _curve(axes, mine)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("learning rate")
        axes.set_title(name)
    figure.savefig(path, dpi=120)


def _cells(axes: Any, mine: Sequence[Found], fractions: Sequence[float], losses: Sequence[float]) -> Any:
    """Cells in columns of learning rates and rows of rank fractions; a cell shows the best of its trials."""
    columns = [math.floor(math.log(_lr(row), COLUMN)) for row in mine]
    first, last = min(columns), max(columns)
    best: dict[tuple[int, int], float] = {}
    for row, column in zip(mine, columns, strict=True):
        if row.status == "finished" and row.loss is not None:
            cell = _row(fractions, row), column
            best[cell] = min(row.loss, best.get(cell, math.inf))
    grid = [[best.get((y, x), math.nan) for x in range(first, last + 1)] for y in range(len(fractions))]
    edges = [COLUMN**k for k in range(first, last + 2)]
    heights = [y - 0.5 for y in range(len(fractions) + 1)]
    shown = None
    if losses:
        low, high = min(losses), max(losses)
        # The upper half is one color: what is bad need not be told apart.
        shown = axes.pcolormesh(
            edges, heights, grid, cmap="viridis_r", vmin=low, vmax=low + (high - low) / 2 or low + 1
        )
    for y, line in enumerate(grid):
        for x, loss in enumerate(line):
            if math.isfinite(loss):
                box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
                axes.annotate(f"{loss:.3f}", (edges[x] * COLUMN**0.5, y + 0.28), ha="center", fontsize=8, bbox=box)
    _dots(axes, mine, [float(_row(fractions, row)) for row in mine])
    axes.set_yticks(range(len(fractions)), [_fraction(fraction) for fraction in fractions])
    axes.set_ylabel("rank fraction")
    return shown


def _row(fractions: Sequence[float], row: Found) -> int:
    assert row.optimizer.rank_fraction is not None
    return list(fractions).index(row.optimizer.rank_fraction)


def _curve(axes: Any, mine: Sequence[Found]) -> None:
    known = [row for row in mine if row.loss is not None and math.isfinite(row.loss)]
    bottom = min((row.loss for row in known if row.loss is not None), default=0.0)
    _dots(axes, mine, [row.loss if row in known and row.loss is not None else bottom for row in mine])
    axes.set_ylabel("best validation loss (nats a token)")
    axes.grid(alpha=0.3)


def _dots(axes: Any, mine: Sequence[Found], heights: Sequence[float]) -> None:
    looks = {"finished": ("o", "black"), "pruned": ("o", "none"), "running": (".", "gray"), "diverged": ("X", "red")}
    for status, (marker, color) in looks.items():
        points = [(_lr(row), y) for row, y in zip(mine, heights, strict=True) if row.status == status]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, marker=marker, s=24, facecolors=color, edgecolors="black", linewidths=0.8, label=status)
    axes.legend(fontsize=8)


def _lr(row: Found) -> float:
    assert row.optimizer.lr is not None
    return row.optimizer.lr


def _fraction(fraction: float | None) -> str:
    return "" if fraction is None else str(Fraction(fraction).limit_denominator(1024))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
