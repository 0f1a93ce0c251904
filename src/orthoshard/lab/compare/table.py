"""The table of a comparison: the loss of each optimizer, how soon it was reached, and what a step costs.

The row of a rival is that of its best pair of learning rates (see `grid`). With several seeds it has means over them,
and the loss also half its range. A loss is *reached* where the line through the validations first crosses it, in steps
and in seconds of training. May import ``orthoshard.lab.compare`` and rich.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from orthoshard.lab import tables
from orthoshard.lab.bench.files import size
from orthoshard.lab.compare.grid import Spot, State
from orthoshard.lab.compare.job import Outcome
from orthoshard.lab.tables import Column


@dataclass(frozen=True)
class Row:
    """Everything that is shown of a rival; None if there is nothing to show."""

    label: str
    status: str
    """`finished`, `diverged` (every learning rate did) or `running`."""
    tried: dict[float, float | None]
    """Best validation loss of the first seed by lr, at the middle of scalar_lr; None if the run diverged."""
    scalar_tried: dict[float, float | None] = field(default_factory=dict[float, float | None])
    """The same by scalar_lr, at the best lr."""
    lr: float | None = None
    at_edge: bool = False
    scalar_lr: float | None = None
    scalar_at_edge: bool = False
    loss: float | None = None
    spread: float | None = None
    """Half the range over the seeds; None for one seed."""
    seeds: int = 0
    diverged_seeds: int = 0
    """The number of seeds that diverged at the best learning rate of the first seed."""
    over_reference: float | None = None
    """Loss minus that of the reference."""
    steps_to: float | None = None
    """Steps until the loss reached the best of the reference; None if it did not on some seed."""
    seconds_to: float | None = None
    optimizer_ms: float | None = None
    step_ms: float | None = None
    state_bytes: int | None = None

    @property
    def runs(self) -> int:
        """The number of runs of the first seed. One run is in both grids."""
        return len(self.tried) + max(0, len(self.scalar_tried) - 1)


def reach(validations: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return the step at which the line between validations first reaches ``target``; None if it never does."""
    before: tuple[int, float] | None = None
    for step, loss in validations:
        if loss <= target:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def seconds_at(elapsed: Sequence[float], step: float) -> float:
    """Return the seconds of training up to a step, which may be fractional; ``elapsed[s]`` is the time of s steps."""
    whole = min(int(step), len(elapsed) - 1)
    rest = step - whole
    following = min(whole + 1, len(elapsed) - 1)
    return elapsed[whole] + rest * (elapsed[following] - elapsed[whole])


def rows(
    outcomes: Mapping[str, Mapping[Spot, Outcome]], states: Mapping[str, State], first_seed: int, reference: str | None
) -> list[Row]:
    """Return one row for each rival, in the given order. The others are to reach the best loss of ``reference``."""
    targets = _best_runs(outcomes, states, reference) if reference is not None else {}
    made: list[Row] = []
    for label, found in outcomes.items():
        mine = {spot: run for spot, run in sorted(found.items()) if spot.seed == first_seed}
        tried = {run.lr: _finite(run.loss) for spot, run in mine.items() if spot.j == 0}
        state = states[label]
        if state.best is None:
            made.append(Row(label, "running" if state.missing or not tried else "diverged", tried))
            continue
        at_best = [run for spot, run in mine.items() if spot.k == state.best[0]]
        best = _best_runs(outcomes, states, label)
        whole = {seed: run for seed, run in best.items() if math.isfinite(run.loss)}
        losses = [run.loss for run in whole.values()]
        shared = [seed for seed in best if seed in targets and math.isfinite(targets[seed].loss)]
        steps = [reach(best[seed].validations, targets[seed].loss) for seed in shared]
        reached = [step for step in steps if step is not None]
        complete = bool(shared) and len(reached) == len(shared)
        seconds = [seconds_at(best[seed].elapsed, step) for seed, step in zip(shared, reached, strict=False)]
        both = [seed for seed in shared if seed in whole]
        made.append(
            Row(
                label,
                "running" if state.missing else "finished",
                tried,
                {run.scalar_lr: _finite(run.loss) for run in at_best if run.scalar_lr is not None},
                lr=best[first_seed].lr,
                at_edge=state.at_edge,
                scalar_lr=best[first_seed].scalar_lr,
                scalar_at_edge=state.scalar_at_edge,
                loss=statistics.fmean(losses),
                spread=(max(losses) - min(losses)) / 2 if len(losses) > 1 else None,
                seeds=len(losses),
                diverged_seeds=len(best) - len(whole),
                over_reference=statistics.fmean(best[s].loss - targets[s].loss for s in both) if both else None,
                steps_to=statistics.fmean(reached) if complete else None,
                seconds_to=statistics.fmean(seconds) if complete else None,
                optimizer_ms=_median(run.optimizer_ms for run in best.values()),
                step_ms=_median(run.step_ms for run in best.values()),
                state_bytes=best[first_seed].state_bytes,
            )
        )
    return made


def _best_runs(
    outcomes: Mapping[str, Mapping[Spot, Outcome]], states: Mapping[str, State], label: str
) -> dict[int, Outcome]:
    """Return the runs at the best learning rates, by seed."""
    best = states[label].best
    return {spot.seed: run for spot, run in outcomes[label].items() if (spot.k, spot.j) == best}


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


ROOMY = 96  # columns that the whole table takes on a terminal


def _rate(lr: float, at_edge: bool) -> str:
    return f"{lr:.3g}" + (" (edge)" if at_edge else "")


def _loss(row: Row) -> str:
    text = f"{row.loss:.3f}" + (f" ± {row.spread:.3f}" if row.spread is not None else "")
    if row.diverged_seeds:
        text += f" ({row.diverged_seeds} diverged)"
    return text + (" …" if row.status == "running" else "")


def _never(row: Row) -> str:
    return "" if row.over_reference is None else "never"  # without a reference there is nothing to reach


# How the best of an optimizer reads in every table.
BEST = (
    Column("optimizer", "label", short="", words=True),
    Column("best lr", "lr", none="", cell=lambda row: _rate(row.lr, row.at_edge)),
    Column(
        "scalar lr", "scalar_lr", none="", cell=lambda row: _rate(row.scalar_lr, row.scalar_at_edge), short="scalar\nlr"
    ),
    Column("validation loss", "loss", none=lambda row: row.status, cell=_loss, short="loss"),
)
OPTIMIZER_MS = Column("optimizer ms", "optimizer_ms", "{:.1f}".format, "", short="optimizer\nms")


def columns(reference: str | None) -> tuple[Column, ...]:
    """Return the columns of a table of rows."""
    mark = reference or "reference"
    return (
        *BEST,
        Column(f"minus {mark}", "over_reference", "{:+.3f}".format, "", short=f"minus\n{reference or ''}"),
        Column(f"steps to {mark}'s best", "steps_to", "{:.0f}".format, _never, short="steps to\nits loss"),
        Column("seconds to it", "seconds_to", "{:.0f}".format, _never, short="seconds to\nits loss"),
        OPTIMIZER_MS,
        Column("step ms", "step_ms", "{:.0f}".format, "", short="step\nms"),
        Column("state", "state_bytes", size, ""),
        Column("runs", "runs"),
    )


def screen(made: Sequence[Row], reference: str | None, width: int = 120) -> Table:
    """Return a table for a terminal. On a narrow one the less interesting columns are left out."""
    shown = [each for each in columns(reference) if width >= ROOMY or each.key not in ("step_ms", "runs")]
    least = min((row.loss for row in made if row.loss is not None), default=None)

    def style(row: Row) -> str | None:
        best = row.loss is not None and row.loss == least
        return "bold" if best else "red" if row.status == "diverged" else None

    return tables.screen(shown, made, style=style)


def markdown(made: Sequence[Row], reference: str | None, caption: str) -> str:
    """Return a Markdown table with the caption below it."""
    return f"{tables.markdown(columns(reference), made)}\n{caption}\n"
