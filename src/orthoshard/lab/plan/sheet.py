"""Printing a plan as tables and sentences. May import rich and this room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orthoshard.lab.plan.make import Planned
from orthoshard.lab.plan.recommend import Advice
from orthoshard.lab.plan.tables import AMOUNTS, CHECK, NO_ROOM, seconds, times
from orthoshard.lab.tables import screen


def show(planned: Planned, advice: Advice, words: tuple[str, ...], console: Console) -> None:
    """Print the plan, the recommendation and the assumptions."""
    job, where = planned.job, " × ".join(f"{name}={size}" for name, size in planned.mesh) or "one process"
    described = planned.subject.described
    active = f", {job.active / 1e9:.4g} B active" if job.active < planned.subject.parameters else ""
    console.print(
        f"{described.name}: {planned.subject.parameters / 1e9:.4g} B parameters{active} ({described.source}); {where}; "
        f"{planned.hardware.about}",
        highlight=False,
    )
    model = planned.lines[0].times.model
    console.print(
        f"{job.tokens_per_step / 1e6:.4g} M tokens a step, {job.tokens / 1e12:.4g} T in all: "
        f"{job.tokens / job.tokens_per_step:,.0f} steps; forward and backward {seconds(model)}\n",
        highlight=False,
    )
    rows, chosen = [line.plain(planned.links) for line in planned.lines], advice.chosen.contestant.name
    console.print(screen(AMOUNTS, rows, title="one step, on one rank"))
    console.print(
        screen(
            times(bool(job.price)),
            rows,
            title="time and cost",
            style=lambda row: "bold" if row["name"] == chosen else None,
        )
    )
    if any(not line.fits for line in planned.lines):
        console.print(NO_ROOM, highlight=False)
    for title, sentences in (("Recommendation", advice.words), ("Assumptions", words)):
        console.print(f"\n[bold]{title}[/bold]")
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)


def check_table(model: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table of predicted and measured steps."""
    return screen(CHECK, rows, title=f"one step of {model}, rows cut over gloo processes")
