"""Steps and seconds until each optimizer's loss is the reference's best (Figure 1 of the Dion paper, arXiv 2504.05295).

Bars are means over the seeds at the best learning rate, whiskers half the range. Seed by seed the mark is the
reference's own best loss on that seed. An optimizer that misses it on some seed has no bar.

Seconds are given twice. ``seconds``: as they passed, with all that disturbed the machine. ``quiet_seconds``: steps x
(the least median time that a step of any run here took outside of its optimizer + the least that this optimizer took),
as if every run had had the machine at its quietest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthoshard.lab.canvas import styles, svg
from orthoshard.lab.compare.job import Outcome
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, Point, labels, seeds
from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.compare.table import reach, seconds_at
from orthoshard.lab.tables import Column, markdown

COLUMNS = (
    Column("comparison", "comparison", words=True),
    Column("optimizer", "label", words=True),
    Column("steps", "steps", none=lambda r: f"never ({r['reached']} of {r['seeds']} seeds)", cell=lambda r: _steps(r)),
    Column("of its run", "share_of_reference_run", "{:.0%}".format, ""),
    Column("seconds, quiet", "quiet_seconds", "{:.1f}".format, ""),
    Column("seconds, as they passed", "seconds", "{:.0f}".format, ""),
    Column("seeds", "seeds"),
)


def draw(given: Sequence[Results], options: Options) -> Drawn:
    reference = str(options.get("reference", "adamw"))
    shown = [results for results in given if any(row.label == reference and row.lr for row in results.rows)]
    data = [_reached(results, reference) for results in shown]
    colors = styles(labels(shown))

    def fill(figure: Any) -> None:
        axes = figure.subplots(max(1, len(shown)), 2, squeeze=False)
        for (steps, seconds), entry in zip(axes, data, strict=False):
            names = [rival["label"] for rival in entry["rivals"]]
            for k, rival in enumerate(entry["rivals"]):
                color = colors[rival["label"]]["color"]
                if rival["steps"] is None:
                    for ax in (steps, seconds):
                        ax.annotate("never", (k, 0), rotation=90, ha="center", va="bottom", fontsize=8)
                    continue
                steps.bar(k, rival["steps"], yerr=rival["steps_spread"], color=color, capsize=2)
                seconds.bar(k, rival["seconds"], fill=False, edgecolor=color, linestyle=":")
                if rival["quiet_seconds"] is not None:
                    seconds.bar(k, rival["quiet_seconds"], yerr=rival["quiet_seconds_spread"], color=color, capsize=2)
            for ax, what in ((steps, "steps"), (seconds, "seconds of training")):
                ax.set_xlim(-0.7, len(names) - 0.3)
                ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
                ax.set_ylabel(what)
                ax.set_title(entry["comparison"])

    caption = (
        f"Steps and seconds of training until the loss is {reference}'s best on the same seed, each optimizer at its "
        f"best learning rate; {seeds(shown)}. Dotted: seconds as they passed on a machine that did other work too; "
        "filled: at the least times of a step that any run saw. Runs have a fixed length and a falling rate, so "
        "that a mark reached early is reached before the rate has fallen."
    )
    rows = [{"comparison": entry["comparison"], **rival} for entry in data for rival in entry["rivals"]]
    svg_text = svg(fill, 8, 2.9 * max(1, len(shown)))
    return Drawn({"reference": reference, "comparisons": data}, svg_text, caption, markdown(COLUMNS, rows))


def _reached(results: Results, reference: str) -> dict[str, Any]:
    marks = {run.seed: run for run in results.best(reference)}
    runs = [run for mine in results.runs.values() for run in mine.values()]
    outside = [
        run.step_ms - run.optimizer_ms for run in runs if run.step_ms is not None and run.optimizer_ms is not None
    ]
    rest = min(outside, default=None)
    return {
        "comparison": results.name,
        "rest_of_step_ms": rest,
        "rivals": [_rival(results, row.label, marks, rest) for row in results.rows if row.lr is not None],
    }


def _rival(results: Results, label: str, marks: Mapping[int, Outcome], rest: float | None) -> dict[str, Any]:
    runs = results.best(label)
    pairs = [(run, reach(run.validations, marks[run.seed].loss)) for run in runs if run.seed in marks]
    reached = [(run, step) for run, step in pairs if step is not None]
    own = min((run.optimizer_ms for run in results.runs[label].values() if run.optimizer_ms is not None), default=None)
    found: dict[str, Any] = {"label": label, "lr": runs[0].lr, "seeds": len(pairs), "reached": len(reached)}
    found["optimizer_ms"] = own
    quiet = None if rest is None or own is None else (rest + own) / 1e3
    values = {
        "steps": [step for _, step in reached],
        "seconds": [seconds_at(run.elapsed, step) for run, step in reached],
        "quiet_seconds": [step * quiet for _, step in reached] if quiet is not None else [],
    }
    for what, each in values.items():
        point = Point.of(each) if each and len(reached) == len(pairs) else None
        found |= {what: point and point.mean, f"{what}_spread": point and point.spread}
    steps = [mark.steps for mark in marks.values()]
    found["share_of_reference_run"] = found["steps"] / Point.of(steps).mean if found["steps"] is not None else None
    return found


def _steps(rival: Mapping[str, Any]) -> str:
    spread = "" if rival["steps_spread"] is None else f" ± {rival['steps_spread']:.0f}"
    return f"{rival['steps']:.0f}{spread}"
