"""Loss curves of runs of `orthoshard train`, and of the runs in a comparison.

    validation    every finite loss
    training      the running mean over a sixtieth of the run, as in loss.png, at no more than 600 of its steps
    x axis        steps, seconds of training without validations and checkpoints, or tokens seen

May import ``orthoshard.lab.train`` and ``orthoshard.lab.bench.files``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orthoshard.lab.bench.files import size
from orthoshard.lab.report import fields
from orthoshard.lab.report.content import Axis, Cell, Chart, Line, Section, Series, Table, cells, thinned
from orthoshard.lab.report.fields import Damaged
from orthoshard.lab.tables import Column
from orthoshard.lab.train import record
from orthoshard.lab.train.plot import running_mean

AXES = (Axis("steps", "steps"), Axis("seconds", "seconds of training"), Axis("tokens", "tokens"))
LOSSES = ("validation", "training")
UNIT = "loss, nats a token"


def count(value: float) -> str:
    """Return a number as a short text, such as 1.23K for 1,234."""
    for prefix, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= prefix:
            return f"{value / prefix:.3g}{unit}"
    return f"{value:.0f}"


COLUMNS = (
    Column("run", "run", words=True),
    Column("optimizer", "config.optimizer.name", words=True),
    Column("model", "config.model.name", words=True),
    Column("data", "data.name", words=True),
    Column("parameters", "parameters", count, ""),
    Column("learning rate", "config.optimizer.lr", "{:.3g}".format, ""),
    Column("steps", "steps", "{:,.0f}".format),
    Column("tokens", "tokens", count),
    Column("last validation loss", "loss", "{:.3f}".format, ""),
    Column("seconds", "seconds", "{:.0f}".format),
    Column("in the optimizer", "optimizer", "{:.1%}".format, ""),
    Column("optimizer state", "state", size, ""),
    Column("status", "status", words=True),
)
SHOWN = 8  # curves that a chart shows at first: more cannot be told apart

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Run:
    """A run, with its curve and its row in the table of runs."""

    source: str
    curve: Series
    cells: tuple[Cell, ...]


def series(
    label: str,
    validations: Points,
    train: Points,
    elapsed: Sequence[float],
    tokens: Sequence[float],
    shown: bool = True,
) -> Series:
    """Return the curve of a run. Raises ``Damaged`` for a loss at a step that was not taken.

    ``elapsed`` and ``tokens`` are totals after each step; [0] is 0.
    """

    def line(points: Sequence[tuple[float, float]]) -> Line:
        steps = [int(step) for step, _ in points]
        if any(not 0 <= step < len(elapsed) or step >= len(tokens) for step in steps):
            raise Damaged("it has a loss at a step that was not taken")
        x = {"steps": steps, "seconds": [elapsed[s] for s in steps], "tokens": [tokens[s] for s in steps]}
        return Line({key: [_short(value) for value in values] for key, values in x.items()}, [y for _, y in points])

    good = [(step, loss) for step, loss in train if loss is not None]
    means = running_mean([loss for _, loss in good], span=max(2, len(good) // 60))
    kept = [(good[k][0], _short(means[k])) for k in thinned(len(good))]
    known = [(step, _short(loss)) for step, loss in validations if loss is not None]
    return Series(label, {"validation": line(known), "training": line(kept)}, shown)


def loss_chart(title: str, found: Sequence[Series]) -> Chart:
    """Return a chart of the loss curves of several runs."""
    note = "Training losses are running means over a sixtieth of the run."
    return Chart(title, AXES, LOSSES, UNIT, tuple(found), late=True, note=note)


def read_run(folder: Path) -> Run:
    """Return the run in a folder. Raises ``Damaged`` and ``UserError``."""
    events = record.read(folder)
    if not events or events[0].get("kind") != "run":
        raise Damaged("it does not begin with the settings of a run")
    head = events[0]
    config = fields.table(head, "config")
    elapsed, tokens, optimizer = [0.0], [0.0], 0.0
    train: list[tuple[float, float | None]] = []
    validations: list[tuple[float, float | None]] = []
    state: float | None = None
    status, skipped = "not finished", 0
    for event in events[1:]:
        kind = fields.text(event, "kind")
        if kind == "step":
            if fields.real(event, "step") != len(elapsed):
                raise Damaged(f"step {len(elapsed)} is missing")
            elapsed.append(elapsed[-1] + fields.real(event, "seconds"))
            tokens.append(tokens[-1] + fields.real(event, "tokens"))
            optimizer += fields.real(event, "optimizer_seconds")
            train.append((len(elapsed) - 1, fields.maybe(event, "loss")))
            skipped += bool(event.get("skipped"))
        elif kind == "validation":
            validations.append((fields.real(event, "step"), fields.maybe(event, "loss")))
        elif kind == "finished":
            status, state = "finished", fields.maybe(event, "state_bytes")
    name = folder.resolve().name
    losses = [loss for _, loss in validations if loss is not None]
    row = {
        "run": name,
        "config": config,
        "data": fields.table(head, "data"),
        "parameters": head.get("parameters"),
        "steps": len(train),
        "tokens": tokens[-1],
        "loss": losses[-1] if losses else None,
        "seconds": elapsed[-1],
        "optimizer": optimizer / elapsed[-1] if elapsed[-1] else None,
        "state": state,
        "status": f"{status}, {skipped} skipped" if skipped else status,
    }
    return Run(str(folder), series(name, validations, train, elapsed, tokens), cells(COLUMNS, row))


def runs_section(runs: Sequence[Run]) -> Section:
    """Return one section with all runs of `orthoshard train`."""
    shown = [replace(run.curve, shown=k < SHOWN) for k, run in enumerate(runs)]
    return Section(
        "Training runs",
        "runs",
        tuple(run.source for run in runs),
        charts=(loss_chart("Loss of each run", shown),),
        tables=(Table("Runs", tuple(column.heading for column in COLUMNS), tuple(run.cells for run in runs)),),
    )


def _short(value: float) -> float:
    """Return ``value`` rounded to six digits, more than a screen can show."""
    return float(f"{value:.6g}")
