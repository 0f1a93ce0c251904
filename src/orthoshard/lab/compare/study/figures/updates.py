"""What the low rank does to the momentum, over time: from runs with `diagnostics` (see `orthoshard.diagnostics`).

    captured          share of the squared norm of the momentum that rank r captures
    effective_rank    of the momentum, over the smaller side
    orthogonality     |PᵀP - I| / sqrt(r) of the orthonormal factor: rounding
    basis             the same of the other factor, whose columns Dion only brings to unit length

Lines are means over the matrices of the model, bands their range; the first seed at the best learning rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from orthoshard.lab.canvas import panels, styles, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, labels
from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.tables import Column, markdown
from orthoshard.lab.train.record import Event

PANELS = {
    "captured": "captured share of the momentum",
    "effective_rank": "effective rank of the momentum, share of full",
    "orthogonality": "orthogonality error of P (Muon: of the update)",
    "basis": "orthogonality error of Q",
}
SMALL = ("orthogonality", "basis")
COLUMNS = (
    Column("optimizer", "label", words=True),
    Column("", "step", words=True),
    *(Column(title, what, ("{:.2g}" if what in SMALL else "{:.3f}").format, "") for what, title in PANELS.items()),
)


def draw(given: Sequence[Results], options: Options) -> Drawn:
    data: list[dict[str, Any]] = []
    for results in given:
        for row in results.rows:
            runs = results.best(row.label) if row.lr is not None else []
            events = [event for event in results.events(runs[0]) if event["kind"] == "diagnostics"] if runs else []
            if events:
                about = {"comparison": results.name, "label": row.label, "lr": row.lr}
                data.append(about | {"steps": [event["step"] for event in events], **_series(events)})
    looks = styles(labels(given))

    def fill(figure: Any) -> None:
        for axes, (what, title) in zip(panels(figure, len(PANELS), most=2), PANELS.items(), strict=True):
            for curve in data:
                points = [(step, *each) for step, each in zip(curve["steps"], curve[what], strict=True) if each]
                if points:
                    steps, means, low, high = zip(*points, strict=True)
                    look = looks[curve["label"]] | {"marker": None}
                    axes.plot(steps, means, label=curve["label"], **look)
                    axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
            axes.set_yscale("log" if what in SMALL else "linear")
            axes.set_xlabel("step")
            axes.set_title(title)
        if data:
            figure.axes[1].legend()  # every optimizer has an effective rank

    caption = (
        "Each optimizer at one learning rate, one seed. Lines are means over the model's matrices, bands from the "
        "least to the largest. Muon has no rank: no captured share, and no Q."
    )
    return Drawn({"curves": data}, svg(fill, 9, 6.4), caption, _table(data))


def _series(events: Sequence[Event]) -> dict[str, list[list[float] | None]]:
    """Return for each panel and step the mean, least and largest over the matrices; None if there is no number."""
    found: dict[str, list[list[float] | None]] = {what: [] for what in PANELS}
    for event in events:
        for what, series in found.items():
            values = [
                figures[what] / (_full(figures, event) if what == "effective_rank" else 1.0)
                for figures in event["parameters"].values()
                if figures[what] is not None
            ]
            series.append([statistics.fmean(values), min(values), max(values)] if values else None)
    return found


def _full(figures: dict[str, Any], event: Event) -> float:
    """Return the smaller side of the matrices of a parameter."""
    return figures["rank"] / (event["groups"][figures["group"]]["rank_fraction"] or 1.0)


def _table(data: Sequence[dict[str, Any]]) -> str:
    """Early, in the middle and at the end: the means over the matrices."""
    rows: list[dict[str, Any]] = []
    for curve in data:
        steps = curve["steps"]
        for k in sorted({0, len(steps) // 2, len(steps) - 1}):
            means = {what: curve[what][k] and curve[what][k][0] for what in PANELS}
            rows.append({"label": curve["label"], "step": f"step {steps[k]}", **means})
    return markdown(COLUMNS, rows)
