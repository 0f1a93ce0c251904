"""Validation loss over the steps, each optimizer at its best learning rate: the mean over seeds, and their range."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from orthoshard.lab.canvas import panels, size, styles, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, labels, seeds
from orthoshard.lab.compare.study.results import Results


def draw(given: Sequence[Results], options: Options) -> Drawn:
    data: list[dict[str, Any]] = [{"comparison": results.name, "rivals": _curves(results)} for results in given]
    looks = styles(labels(given))

    def fill(figure: Any) -> None:
        for axes, entry in zip(panels(figure, len(data), most=2), data, strict=True):
            for rival in entry["rivals"]:
                look = looks[rival["label"]] | {"marker": None}
                axes.plot(rival["steps"], rival["mean"], label=rival["label"], **look)
                if rival["seeds"] > 1:
                    axes.fill_between(
                        rival["steps"], rival["low"], rival["high"], color=look["color"], alpha=0.2, linewidth=0
                    )
            late = [
                loss
                for rival in entry["rivals"]
                for step, *losses in zip(rival["steps"], rival["low"], rival["high"], strict=True)
                if step >= rival["steps"][-1] / 5  # the fall before it would flatten all that differs
                for loss in losses
            ]
            if late:
                margin = 0.04 * (max(late) - min(late) or 1.0)
                axes.set_ylim(min(late) - margin, max(late) + margin)
                axes.legend()
            axes.set_xlabel("step")
            axes.set_ylabel("validation loss (nats a token)")
            axes.set_title(entry["comparison"])

    caption = f"Validation loss, each optimizer at its best learning rate; {seeds(given)}."
    return Drawn({"comparisons": data}, svg(fill, *size(len(data), most=2)), caption)


def _curves(results: Results) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in results.rows:
        runs = results.best(row.label)
        if row.lr is None or not runs:
            continue
        by_step = [
            (step, [dict(run.validations)[step] for run in runs])
            for step, _ in runs[0].validations
            if all(step in dict(run.validations) for run in runs)
        ]
        by_step = [(step, losses) for step, losses in by_step if all(map(math.isfinite, losses))]
        found.append(
            {
                "label": row.label,
                "lr": row.lr,
                "seeds": len(runs),
                "steps": [step for step, _ in by_step],
                "mean": [statistics.fmean(losses) for _, losses in by_step],
                "low": [min(losses) for _, losses in by_step],
                "high": [max(losses) for _, losses in by_step],
            }
        )
    return found
