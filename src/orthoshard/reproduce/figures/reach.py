"""Steps and seconds until each optimizer's loss is the reference's best (Figure 1 of the Dion paper, arXiv 2504.05295).

Bars are means over the seeds at the best learning rate, whiskers half the range. Seed by seed the mark is the
reference's own best loss on that seed. An optimizer that misses it on some seed has no bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthoshard.compare.job import Outcome
from orthoshard.compare.table import reach, seconds_at
from orthoshard.reproduce.canvas import styles, svg
from orthoshard.reproduce.figures.drawn import Drawn, Options, Point, labels, seeds
from orthoshard.reproduce.results import Results


def draw(given: Sequence[Results], options: Options) -> Drawn:
    reference = str(options.get("reference", "adamw"))
    shown = [results for results in given if reference in [row.label for row in results.rows]]
    data = [_reached(results, reference) for results in shown]
    colors = styles(labels(shown))

    def fill(figure: Any) -> None:
        axes = figure.subplots(max(1, len(shown)), 2, squeeze=False)
        for pair, results, entry in zip(axes, shown, data, strict=False):
            for ax, what in zip(pair, ("steps", "seconds"), strict=True):
                for k, rival in enumerate(entry["rivals"]):
                    mean, spread = rival[what], rival[f"{what}_spread"]
                    if mean is None:
                        ax.annotate("never", (k, 0), rotation=90, ha="center", va="bottom", fontsize=8)
                    else:
                        ax.bar(k, mean, yerr=spread, color=colors[rival["label"]]["color"], capsize=2)
                ax.set_xticks(
                    range(len(entry["rivals"])), [r["label"] for r in entry["rivals"]], rotation=45, ha="right"
                )
                ax.set_ylabel(f"{what} of training")
                ax.set_title(results.name)

    caption = (
        f"Steps and seconds of training until the loss is {reference}'s best on the same seed, each optimizer at its "
        f"best learning rate; {seeds(shown) if shown else 'nothing yet'}. Runs have a fixed length and a falling "
        "learning rate, so that a mark reached early is reached before the rate has fallen."
    )
    return Drawn({"reference": reference, "comparisons": data}, svg(fill, 8, 2.9 * max(1, len(shown))), caption)


def _reached(results: Results, reference: str) -> dict[str, Any]:
    marks = {run.seed: run for run in results.best(reference)}
    return {
        "comparison": results.name,
        "rivals": [_rival(row.label, results.best(row.label), marks) for row in results.rows if row.lr is not None],
    }


def _rival(label: str, runs: Sequence[Outcome], marks: dict[int, Outcome]) -> dict[str, Any]:
    pairs = [(run, reach(run.validations, marks[run.seed].loss)) for run in runs if run.seed in marks]
    reached = [(run, step) for run, step in pairs if step is not None]
    found: dict[str, Any] = {"label": label, "lr": runs[0].lr, "seeds": len(pairs), "reached": len(reached)}
    for what in ("steps", "seconds"):
        values = [step if what == "steps" else seconds_at(run.elapsed, step) for run, step in reached]
        point = Point.of(values) if values and len(reached) == len(pairs) else None
        found |= {what: point and point.mean, f"{what}_spread": point and point.spread}
    for what, each in (("steps", lambda run: run.steps), ("seconds", lambda run: run.elapsed[-1])):
        own = [each(mark) for mark in marks.values()]
        mean = Point.of(own).mean if own else None
        found[f"{what}_over_reference_run"] = found[what] / mean if found[what] is not None and mean else None
    return found
