"""The results of a search: a table, a heat map, rows of a comparison, and flags of ``orthoshard train`` for the best.

May import ``orthoshard.lab`` and rich.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.table import Table

from orthoshard.lab import canvas
from orthoshard.lab.compare.folder import differences
from orthoshard.lab.compare.job import Outcome
from orthoshard.lab.compare.search.trials import Found
from orthoshard.lab.compare.table import Row
from orthoshard.lab.tables import Column, screen
from orthoshard.lab.train.config import TrainConfig, to_dict

# A column of the heat map: learning rates within a factor of 2.
COLUMN = 2.0
# Settings whose flag is not their name.
FLAGS = {"model.name": "model", "optimizer.name": "optimizer"}


def _short(value: float) -> str:
    return f"{value:.3g}"


def _fraction(fraction: float) -> str:
    return str(Fraction(fraction).limit_denominator(1024))


COLUMNS = (
    Column("trial", "number"),
    Column("optimizer", "optimizer.name", words=True),
    Column("lr", "optimizer.lr", _short, ""),
    Column("scalar lr", "optimizer.scalar_lr", _short, ""),
    Column("rank fraction", "optimizer.rank_fraction", _fraction, ""),
    Column("momentum", "optimizer.momentum", _short, ""),
    Column("weight decay", "optimizer.weight_decay", _short, ""),
    Column("loss", "loss", lambda loss: "" if math.isinf(loss) else f"{loss:.4f}", ""),
    Column(
        "",
        "status",
        cell=lambda row: "" if row.status == "finished" else f"{row.status} at step {row.step}",
        words=True,
    ),
)


def flags(config: TrainConfig, base: TrainConfig, preset: str) -> str:
    """Return the command that trains with ``config`` once more; ``base`` has the settings of the preset."""
    words = ["orthoshard", "train", *(["--preset", preset] if preset != "default" else [])]
    words += ["--optimizer", config.optimizer.name]
    for name, here in _settings(to_dict(config), to_dict(base)):
        if name != "optimizer.name":
            words.append(f"--{FLAGS.get(name, name.rpartition('.')[2]).replace('_', '-')}")
            words.append(str(here))
    return shlex.join(words)


def _settings(here: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that need a flag: differences from the preset in data, model and schedule, and all settings of
    the optimizer."""
    for part in ("data", "model", "schedule"):
        for name, value, _ in differences(here[part], base[part], f"{part}."):
            yield name, value
    for name, value in here["optimizer"].items():
        if value is not None and value != [] and value != ():
            yield f"optimizer.{name}", value
    if here["seed"] != base["seed"]:
        yield "seed", here["seed"]


def table(found: Sequence[Found], most: int = 12) -> Table:
    """Return a table of the best trials, one on each line."""
    best = found[0] if found and found[0].status == "finished" else None
    return screen(COLUMNS, found[:most], style=lambda row: "bold" if row is best else None)


def row_of(found: Found, run: Outcome | None) -> Row:
    """Return the trial as a row of a comparison."""
    lr, loss = _lr(found), found.loss if found.loss is not None and math.isfinite(found.loss) else None
    return Row(
        found.label,
        found.status,
        {lr: loss},
        lr=lr,
        scalar_lr=found.optimizer.scalar_lr,
        loss=loss,
        seeds=int(loss is not None),
        optimizer_ms=run and run.optimizer_ms,
        step_ms=run and run.step_ms,
        state_bytes=run and run.state_bytes,
    )


def heat_map(found: Sequence[Found], path: Path) -> None:
    """Draw one panel for each optimizer: the best loss by learning rate and rank fraction, or only by learning rate if
    there is at most one rank. Trials are dots, pruned ones are hollow, and diverged ones are crosses."""
    names = sorted({row.optimizer.name for row in found})
    losses = [row.loss for row in found if row.status == "finished" and row.loss is not None]

    def fill(figure: Any) -> None:
        for axes, name in zip(canvas.panels(figure, max(1, len(names)), most=99), names, strict=False):
            mine = [row for row in found if row.optimizer.name == name]
            fractions = sorted({row.optimizer.rank_fraction for row in mine if row.optimizer.rank_fraction is not None})
            if len(fractions) > 1:
                shown = _cells(axes, mine, fractions, losses)
                if shown is not None:
                    figure.colorbar(shown, ax=axes, label="best validation loss (nats a token)")
            else:
                _curve(axes, mine)
            canvas.rates(axes)
            axes.set_title(name)

    canvas.png(fill, path, 1 + 5.5 * max(1, len(names)), 4.8)


def _cells(axes: Any, mine: Sequence[Found], fractions: Sequence[float], losses: Sequence[float]) -> Any:
    """Draw cells, with learning rates in columns and rank fractions in rows; a cell shows the best of its trials."""
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
