"""A plan as tables and sentences. May import rich and this room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orthoshard.lab.plan.make import Line, Planned
from orthoshard.lab.plan.recommend import Advice


def show(planned: Planned, advice: Advice, words: tuple[str, ...], console: Console) -> None:
    """Everything that is known."""
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
        f"{job.tokens / job.tokens_per_step:,.0f} steps; forward and backward {_seconds(model)}\n",
        highlight=False,
    )
    console.print(_amounts(planned))
    console.print(_times(planned, advice))
    if any(not line.fits for line in planned.lines):
        console.print("‡ does not fit into memory.", highlight=False)
    for title, sentences in (("Recommendation", advice.words), ("Assumptions", words)):
        console.print(f"\n[bold]{title}[/bold]")
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)


def _amounts(planned: Planned) -> Table:
    sheet = Table(title="of a step, a rank", title_justify="left")
    sheet.add_column("")
    for head in ("state", "temporaries", "TFLOP", "memory traffic", "in node", "between", "gradients"):
        sheet.add_column(head, justify="right")
    for line in planned.lines:
        mine, sent = line.amounts, {"intra": 0.0, "inter": 0.0}
        for axis, size in mine.sent.items():
            sent[planned.links[axis]] += size
        traffic = mine.touched + mine.passes
        sizes = (traffic, sent["intra"], sent["inter"], sum(mine.synced.values()))
        sheet.add_row(
            name(line), _bytes(mine.state), _bytes(mine.temporaries), f"{mine.flops / 1e12:.3g}", *map(_bytes, sizes)
        )
    return sheet


def _times(planned: Planned, advice: Advice) -> Table:
    sheet = Table(title="time, and what it comes to", title_justify="left")
    sheet.add_column("")
    heads = ["products", "passes", "in node", "between", "optimizer", "gradients", "overhead", "days"]
    for head in heads + (["cost"] if planned.job.price else []):
        sheet.add_column(head, justify="right")
    for line in planned.lines:
        spent = line.times
        parts = (spent.products, spent.passes, spent.intra, spent.inter, spent.optimizer, spent.sync)
        cells = [*map(_seconds, parts), f"{100 * spent.overhead:.3g} %", f"{line.days:,.4g}"]
        style = "bold" if line is advice.chosen else None
        sheet.add_row(name(line), *cells, *([f"{line.cost:,.0f}"] if planned.job.price else []), style=style)
    return sheet


def name(line: Line) -> str:
    """With its mark."""
    return line.contestant.name + ("" if line.fits else " ‡")


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B" if size else "-"


def _seconds(time: float) -> str:
    if not time:
        return "-"
    return f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms" if time >= 1e-3 else f"{time * 1e6:.3g} µs"


def check_table(model: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Predicted beside measured."""
    sheet = Table(title=f"one step of {model}, rows cut over gloo processes, ms", title_justify="left")
    for head in ("processes", "", "predicted", "of products", "passes", "wire", "measured", "predicted / measured"):
        sheet.add_column(head, justify="right" if head else "left")
    for row in rows:
        parts = [f"{row['parts_ms'][part]:.3g}" for part in ("products", "passes", "wire")]
        cells = (f"{row['predicted_ms']:.4g}", *parts, f"{row['measured_ms']:.4g}")
        ratio = f"{row['ratio']:.2f}" + ("" if row["within"] else "  outside")
        sheet.add_row(str(row["processes"]), row["optimizer"], *cells, ratio)
    return sheet
