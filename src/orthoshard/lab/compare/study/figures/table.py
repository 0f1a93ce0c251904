"""The best of each optimizer in each comparison: mean and half the range over seeds, as Markdown and as a dot plot.

A difference is said to *stand out* where the ranges over the seeds of two optimizers do not overlap; with three seeds
that happens by chance one time in ten. One seed says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthoshard.lab.canvas import panels, styles, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options, labels, seeds
from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.compare.table import Row, rate
from orthoshard.lab.tables import markdown

ROW_INCHES = 0.24


def draw(given: Sequence[Results], options: Options) -> Drawn:
    reference = options.get("reference")
    data: list[dict[str, Any]] = []
    for results in given:
        data.append({"comparison": results.name, "rows": [_row(results, row, reference) for row in results.rows]})
    looks = styles(labels(given))

    def fill(figure: Any) -> None:
        for axes, entry in zip(panels(figure, len(data), most=2), data, strict=True):
            for height, row in enumerate(reversed(entry["rows"])):
                if row["loss"] is not None:
                    look = looks[row["label"]] | {"linestyle": "none"}
                    axes.errorbar(row["loss"], height, xerr=row["spread"], capsize=2, markersize=4, **look)
                    axes.plot(row["losses"], [height] * len(row["losses"]), "|", color=look["color"])
            axes.set_ylim(-0.7, len(entry["rows"]) - 0.3)
            axes.set_yticks(range(len(entry["rows"])), [row["label"] for row in reversed(entry["rows"])])
            axes.set_xlabel("best validation loss (nats a token)")
            axes.set_title(entry["comparison"])

    most = max(len(entry["rows"]) for entry in data)
    height = (1.0 + ROW_INCHES * (1 + most)) * -(-len(data) // 2)
    caption = f"Best validation loss at the best learning rates of each; {seeds(given)}."
    return Drawn(
        {"comparisons": data},
        svg(fill, 4.8 * min(2, len(data)), height),
        caption,
        "\n".join(_markdown(e, reference) for e in data),
    )


def _row(results: Results, row: Row, reference: Any) -> dict[str, Any]:
    runs = results.best(row.label) if row.lr is not None else []
    losses = [run.loss for run in runs]
    against = reference in results.runs and reference != row.label
    marks = [run.loss for run in results.best(reference)] if against else []
    apart: bool | None = None
    if len(losses) > 1 and len(marks) > 1:
        apart = max(losses) < min(marks) or min(losses) > max(marks)
    return {
        "label": row.label,
        "status": row.status,
        "lr": row.lr,
        "at_edge": row.at_edge,
        "scalar_lr": row.scalar_lr,
        "scalar_at_edge": row.scalar_at_edge,
        "loss": row.loss,
        "spread": row.spread,
        "losses": losses,
        "less_reference": row.loss - sum(marks) / len(marks) if row.loss is not None and marks else None,
        "stands_out": apart,
        "rates_tried": row.runs,
        "optimizer_ms": row.optimizer_ms,
        "step_ms": row.step_ms,
        "state_bytes": row.state_bytes,
    }


def _markdown(entry: dict[str, Any], reference: Any) -> str:
    against = [f"minus {reference}", "ranges apart"] if reference else []
    head = ["optimizer", "best lr", "scalar lr", "validation loss", *against, "seeds", "rates tried", "optimizer ms"]
    drawn = markdown(head, [_cells(row, bool(reference)) for row in entry["rows"]])
    return f"**{entry['comparison']}**\n\n{drawn}"


def _cells(row: dict[str, Any], against: bool) -> list[str]:
    if row["loss"] is None:
        return [row["label"], "", "", row["status"], *[""] * (2 * against), "", str(row["rates_tried"]), ""]
    loss = f"{row['loss']:.3f}" + (f" ± {row['spread']:.3f}" if row["spread"] is not None else "")
    less = "" if row["less_reference"] is None else f"{row['less_reference']:+.3f}"
    apart = {None: "", True: "yes", False: "no"}[row["stands_out"]]
    return [
        row["label"],
        rate(row["lr"], row["at_edge"]),
        rate(row["scalar_lr"], row["scalar_at_edge"]),
        loss + (" …" if row["status"] == "running" else ""),
        *([less, apart] if against else []),
        str(len(row["losses"])),
        str(row["rates_tried"]),
        "" if row["optimizer_ms"] is None else f"{row['optimizer_ms']:.1f}",
    ]
