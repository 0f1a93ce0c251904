"""Best validation loss against what differs between the comparisons (Figure 2 of the Dion paper, against model size).

    x = "parameters"    of the model
    x = "width"         of the model, one of `orthoshard train`'s sizes
    x = "batch"         tokens a step
    x = "comparison"    its name

Left the loss, right the loss less that of the best optimizer there: the curves of the first panel lie too close.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthoshard.lab.canvas import styles, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, Point, labels, seeds, word
from orthoshard.lab.compare.study.results import Results, parameters
from orthoshard.lab.train.errors import UserError

AXES = {
    "parameters": "parameters of the model",
    "width": "width of the model",
    "batch": "tokens a step",
    "comparison": "",
}


def draw(given: Sequence[Results], options: Options) -> Drawn:
    x = word(options, "x", "parameters", tuple(AXES))
    places = {results.name: place(results, x) for results in given}
    ordered = sorted(given, key=lambda results: _order(places[results.name]))
    curves = {label: _points(label, ordered, places) for label in labels(ordered)}
    least = {
        results.name: min(p["loss"] for curve in curves.values() for p in curve if p["comparison"] == results.name)
        for results in ordered
        if any(p["comparison"] == results.name for curve in curves.values() for p in curve)
    }
    looks = styles(list(curves))

    def fill(figure: Any) -> None:
        for axes, less in zip(figure.subplots(1, 2), (False, True), strict=True):
            for label, points in curves.items():
                if points:
                    heights = [p["loss"] - (least[p["comparison"]] if less else 0.0) for p in points]
                    whiskers = [p["spread"] or 0.0 for p in points]
                    where = [p["place"] for p in points]
                    axes.errorbar(where, heights, yerr=whiskers, label=label, capsize=2, markersize=4, **looks[label])
            if x != "comparison":
                axes.set_xscale("log", base=2)
                ticks = [places[results.name] for results in ordered]
                axes.set_xticks(ticks, [_short(tick) for tick in ticks])
                axes.minorticks_off()
            axes.set_xlabel(AXES[x])
            axes.set_ylabel("loss less the best one's" if less else "best validation loss (nats a token)")
        if least:
            figure.axes[0].legend()

    caption = (
        f"Best validation loss, each optimizer at its own best learning rate there; {seeds(ordered)}. Right: less that "
        "of the optimizer that is best there."
    )
    return Drawn({"x": x, "curves": [{"label": k, "points": v} for k, v in curves.items()]}, svg(fill, 9, 3.8), caption)


def _points(label: str, given: Sequence[Results], places: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for results in given:
        runs = results.best(label) if label in results.runs else []
        row = next((row for row in results.rows if row.label == label), None)
        if row is None or row.lr is None or not runs:
            continue
        point = Point.of([run.loss for run in runs])
        found.append(
            {
                "comparison": results.name,
                "place": places[results.name],
                "lr": row.lr,
                "at_edge": row.at_edge,
                "loss": point.mean,
                "spread": point.spread,
                "seeds": point.count,
            }
        )
    return found


def place(results: Results, x: str) -> Any:
    """Return the place of the comparison on the axis. Raises ``UserError``."""
    from orthoshard.lab.train.model import SIZES

    base = results.comparison.base
    if x == "comparison":
        return results.name
    if x == "batch":
        return base.schedule.batch * base.schedule.accumulate * base.model.context
    if x == "width":
        if base.model.name not in SIZES:
            raise UserError(f"the comparison {results.name} trains {base.model.name}, whose width is not known here.")
        return SIZES[base.model.name].width
    return parameters(results)


def _order(value: Any) -> Any:
    return value if not isinstance(value, str) else 0


def _short(value: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * factor or (unit == "M" and value >= factor):
            return f"{value / factor:.3g} {unit}"
    return f"{value:g}"
