"""The best of each optimizer in each comparison: mean and half the range over seeds, as Markdown and as a dot plot.

A difference is said to *stand out* where the ranges over the seeds of two optimizers do not overlap; with three seeds
that happens by chance one time in ten. One seed says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orthoshard.lab.canvas import panels, styles, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, labels, seeds
from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.compare.table import BEST, OPTIMIZER_MS, Row
from orthoshard.lab.tables import Column, markdown

ROW_INCHES = 0.24
# What the figure's file has of a row.
KEPT = (
    *("label", "status", "lr", "at_edge", "scalar_lr", "scalar_at_edge", "loss", "spread", "losses"),
    *("less_reference", "stands_out", "rates_tried", "optimizer_ms", "step_ms", "state_bytes"),
)


def draw(given: Sequence[Results], options: Options) -> Drawn:
    reference = options.get("reference")
    rows = {results.name: [_against(results, row, reference) for row in results.rows] for results in given}
    looks = styles(labels(given))

    def fill(figure: Any) -> None:
        for axes, (name, mine) in zip(panels(figure, len(rows), most=2), rows.items(), strict=True):
            for height, row in enumerate(reversed(mine)):
                if row.loss is not None:
                    look = looks[row.label] | {"linestyle": "none"}
                    axes.errorbar(row.loss, height, xerr=row.spread, capsize=2, markersize=4, **look)
                    axes.plot(row.losses, [height] * len(row.losses), "|", color=look["color"])
            axes.set_ylim(-0.7, len(mine) - 0.3)
            axes.set_yticks(range(len(mine)), [row.label for row in reversed(mine)])
            axes.set_xlabel("best validation loss (nats a token)")
            axes.set_title(name)

    most = max(len(mine) for mine in rows.values())
    height = (1.0 + ROW_INCHES * (1 + most)) * -(-len(rows) // 2)
    caption = f"Best validation loss at the best learning rates of each; {seeds(given)}."
    data = [
        {"comparison": name, "rows": [{key: getattr(row, key) for key in KEPT} for row in mine]}
        for name, mine in rows.items()
    ]
    table = "\n".join(f"**{name}**\n\n{markdown(_columns(reference), mine)}" for name, mine in rows.items())
    return Drawn({"comparisons": data}, svg(fill, 4.8 * min(2, len(rows)), height), caption, table)


@dataclass(frozen=True)
class Against(Row):
    """A row beside the reference of the figure."""

    losses: Sequence[float] = ()
    less_reference: float | None = None
    stands_out: bool | None = None

    @property
    def rates_tried(self) -> int:
        return self.runs


def _against(results: Results, row: Row, reference: Any) -> Against:
    losses = [run.loss for run in results.best(row.label)] if row.lr is not None else []
    against = reference in results.runs and reference != row.label
    marks = [run.loss for run in results.best(reference)] if against else []
    less, apart = None, None
    if row.loss is not None and marks:
        less = row.loss - sum(marks) / len(marks)
    if len(losses) > 1 and len(marks) > 1:
        apart = max(losses) < min(marks) or min(losses) > max(marks)
    return Against(**vars(row), losses=losses, less_reference=less, stands_out=apart)


def _columns(reference: Any) -> list[Column]:
    against = (
        Column(f"minus {reference}", "less_reference", "{:+.3f}".format, ""),
        Column("ranges apart", "stands_out", {True: "yes", False: "no"}.__getitem__, ""),
    )
    return [
        *BEST,
        *(against if reference else ()),
        Column("seeds", "losses", lambda losses: str(len(losses) or "")),
        Column("rates tried", "rates_tried"),
        OPTIMIZER_MS,
    ]
