"""Loss against the learning rate of matrices, on the first seed, which the grids ran on.

    panels = "comparisons"    a panel for each comparison, a curve for each optimizer: sensitivity
    panels = "rivals"         a panel for each optimizer, a curve for each comparison: transfer across widths

With at least three rates that did not diverge, the *vertex* is the lowest point of the parabola through the best rate
and its two neighbours in log2 of the rate: a finer guess at the best rate than the grid. ``within`` is how many
factors of 2 lie between the two rates at which the loss is 0.02 nats above the best: a measure of how much it matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from orthoshard.lab.canvas import panels, rates, size, styles, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, labels, word
from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.tables import Column, markdown

NEAR = 0.02  # nats; about twice what seeds differ by in the runs that this was written for
COLUMNS = (
    Column("comparison", "comparison", words=True),
    Column("optimizer", "label", words=True),
    Column("best of the grid", "best", "{:.3g}".format, "diverged"),
    Column("vertex", "vertex", "{:.3g}".format, "at the edge"),
    Column(
        "loss at the best", "best", none="", cell=lambda curve: f"{curve['loss'][curve['lr'].index(curve['best'])]:.3f}"
    ),
    Column(f"factors of 2 within {NEAR}", "within", "{:.1f}".format, "more than tried"),
)


def draw(given: Sequence[Results], options: Options) -> Drawn:
    by = word(options, "panels", "comparisons", ("comparisons", "rivals"))
    curves = [_curve(results, label) for results in given for label in results.runs]
    curves = [curve for curve in curves if curve["lr"]]
    panel, line = ("comparison", "label") if by == "comparisons" else ("label", "comparison")
    names = list(dict.fromkeys(curve[panel] for curve in curves))
    looks = styles(labels(given) if by == "comparisons" else [results.name for results in given])

    def fill(figure: Any) -> None:
        for axes, name in zip(panels(figure, max(1, len(names))), names, strict=False):
            mine = [curve for curve in curves if curve[panel] == name]
            for curve in mine:
                known = [(lr, loss) for lr, loss in zip(curve["lr"], curve["loss"], strict=True) if loss is not None]
                axes.plot(
                    *(zip(*known, strict=True) if known else ([], [])),
                    label=curve[line],
                    markersize=4,
                    **looks[curve[line]],
                )
            top = axes.get_ylim()[1]
            for curve in mine:
                bad = [lr for lr, loss in zip(curve["lr"], curve["loss"], strict=True) if loss is None]
                if bad:  # an empty unclipped line would spoil the layout
                    axes.plot(bad, [top] * len(bad), "x", color=looks[curve[line]]["color"], clip_on=False)
            rates(axes, sorted({lr for curve in mine for lr in curve["lr"]}))
            axes.set_ylabel("best validation loss (nats a token)")
            axes.set_title(name)
            axes.legend()

    caption = "Best validation loss against the learning rate, on the first seed; a cross on the upper edge diverged."
    return Drawn(
        {"panels": by, "curves": curves}, svg(fill, *size(max(1, len(names)))), caption, markdown(COLUMNS, curves)
    )


def _curve(results: Results, label: str) -> dict[str, Any]:
    row = next(row for row in results.rows if row.label == label)
    tried = dict(sorted(row.tried.items()))
    known = {lr: loss for lr, loss in tried.items() if loss is not None}
    return {
        "comparison": results.name,
        "label": label,
        "lr": list(tried),
        "loss": list(tried.values()),
        "best": min(known, key=lambda lr: known[lr], default=None),
        "vertex": vertex(tried),
        "within": within(tried),
    }


def vertex(tried: Mapping[float, float | None]) -> float | None:
    """Return the rate at the bottom of the parabola; None if the best is at the edge, or too few rates are known."""
    known = sorted((math.log2(lr), loss) for lr, loss in tried.items() if loss is not None)
    if len(known) < 3:
        return None
    k = min(range(len(known)), key=lambda k: known[k][1])
    if k in (0, len(known) - 1):
        return None
    (x0, y0), (x1, y1), (x2, y2) = known[k - 1 : k + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if right <= left:
        return None  # three equal losses
    return 2 ** ((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left))


def within(tried: Mapping[float, float | None], near: float = NEAR) -> float | None:
    """Return the width of the range of rates, as a power of 2, in which the line through the tried ones is less than
    ``near`` above the best loss; None if the range reaches the edge of the tried ones."""
    known = sorted((math.log2(lr), math.inf if loss is None else loss) for lr, loss in tried.items())
    if not known or math.isinf(least := min(loss for _, loss in known)):
        return None
    k = [loss for _, loss in known].index(least)
    ends = [_crossing(known[k::-1], least + near), _crossing(known[k:], least + near)]
    return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]


def _crossing(outward: Sequence[tuple[float, float]], level: float) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(outward):
        if y1 > level:
            return x0 + (x1 - x0) * ((level - y0) / (y1 - y0) if math.isfinite(y1) else 1.0)
    return None
