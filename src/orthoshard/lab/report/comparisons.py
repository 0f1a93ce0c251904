"""Sections for results.json of `orthoshard compare`: the table that `compare` prints, a curve of every run, and how
much the learning rate matters.

May import ``orthoshard.lab.compare`` and ``orthoshard.lab.train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthoshard.lab.compare.table import Row, columns
from orthoshard.lab.report import fields
from orthoshard.lab.report.benches import environment
from orthoshard.lab.report.content import Axis, Chart, Line, Section, Series, tabulate
from orthoshard.lab.report.curves import loss_chart, series
from orthoshard.lab.report.fields import Damaged

NUMBERS = tuple(column.key for column in columns(None) if column.key not in ("label", "runs"))
RATE = Axis("lr", "learning rate", log=True)
BEST = "best validation loss"


def recognised(found: dict[str, Any]) -> bool:
    """Return whether this is a result of compare."""
    return {"rivals", "rows", "runs"} <= found.keys()


def section(found: dict[str, Any], source: str) -> Section:
    """Return the section of a comparison. Raises ``Damaged``."""
    reference = found.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise Damaged("'reference' is not a text")
    rows = [_row(values) for values in fields.tables(found, "rows")]
    base = fields.table(found, "base")
    schedule, model = fields.table(base, "schedule"), fields.table(base, "model")
    a_step = fields.real(schedule, "batch") * fields.real(schedule, "accumulate") * fields.real(model, "context")
    best = {row.label: (row.lr, row.scalar_lr) for row in rows}
    first = fields.listed(fields.table(found, "sweep"), "seeds")[:1]
    curves = [_curve(run, a_step, best, first) for run in fields.tables(found, "runs")]
    curves.sort(key=lambda curve: not curve.shown)
    name = fields.text(model, "name")
    data = fields.text(fields.table(base, "data"), "corpus")
    table = tabulate(
        "Each optimizer at its best learning rate",
        columns(reference),
        rows,
        "Validation loss in nats per token, ± half the range over seeds if there are several. (edge): the best "
        "learning rate is the smallest or largest that was tried.",
    )
    return Section(
        f"Comparison: {name} on {data}",
        "comparison",
        (source,),
        facts=(
            ("steps", f"{fields.real(schedule, 'steps'):,.0f} of {a_step:,.0f} tokens"),
            ("seeds", ", ".join(str(seed) for seed in fields.listed(fields.table(found, "sweep"), "seeds"))),
            *(environment(fields.table(found, "report")) if "report" in found else ()),
        ),
        charts=(
            loss_chart("Loss at the best learning rate", curves),
            _rates(rows),
        ),
        tables=(table,),
    )


def _row(values: dict[str, Any]) -> Row:
    tried = dict(fields.pairs(values, "tried"))
    scalars = dict(fields.pairs(values, "scalar_tried")) if "scalar_tried" in values else {}
    numbers = {key: fields.maybe(values, key) for key in (*NUMBERS, "spread", "seeds", "diverged_seeds")}
    whole = {key: int(numbers.pop(key) or 0) for key in ("state_bytes", "seeds", "diverged_seeds")}
    if numbers["loss"] is not None and numbers["lr"] is None:
        raise Damaged("a row has a loss and no learning rate")
    plain: dict[str, Any] = numbers | whole | {"state_bytes": whole["state_bytes"] or None}
    edges = {key: bool(values.get(key)) for key in ("at_edge", "scalar_at_edge")}
    return Row(fields.text(values, "label"), fields.text(values, "status"), tried, scalars, **edges, **plain)


def _curve(
    run: dict[str, Any], a_step: float, best: dict[str, tuple[float | None, float | None]], first: Sequence[object]
) -> Series:
    label, lr, seed = fields.text(run, "label"), fields.real(run, "lr"), fields.real(run, "seed")
    elapsed = fields.reals(run, "elapsed")
    tokens = [a_step * step for step in range(len(elapsed))]
    if label not in best:
        raise Damaged(f"it has a run of {label!r}, and no row of it")
    scalar_lr = fields.maybe(run, "scalar_lr")
    shown = best[label] == (lr, scalar_lr) and seed in first
    name = f"{label}, lr {lr:.3g}" + ("" if scalar_lr is None else f", scalar lr {scalar_lr:.3g}")
    name += "" if seed in first else f", seed {seed:.0f}"
    if run.get("status") == "diverged":
        name += " (diverged)"
    return series(name, fields.pairs(run, "validations"), fields.pairs(run, "train"), elapsed, tokens, shown)


def _rates(rows: Sequence[Row]) -> Chart:
    found: list[Series] = []
    for row in rows:
        known = sorted((lr, loss) for lr, loss in row.tried.items() if loss is not None)
        lines = {BEST: Line({"lr": [lr for lr, _ in known]}, [loss for _, loss in known])}
        bad = [f"{lr:.3g}" for lr, loss in row.tried.items() if loss is None]
        found.append(Series(row.label + (f" (diverged at {', '.join(bad)})" if bad else ""), lines))
    return Chart("How much the learning rate matters", (RATE,), (BEST,), "loss, nats a token", tuple(found))
