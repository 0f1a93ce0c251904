"""The loss curve of a run, from its record alone: every step as a faint line, the running mean, validations as dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthoshard.lab import canvas
from orthoshard.lab.train.record import Event


def plot_loss(events: Sequence[Event], path: Path) -> None:
    """Write the loss curve to ``path`` as PNG. Skipped steps are marked on the x axis."""
    canvas.png(lambda figure: _draw(events, figure.add_subplot()), path, 8, 4.5)


def _draw(events: Sequence[Event], axes: Any) -> None:
    steps = [e for e in events if e["kind"] == "step"]
    good = [(e["step"], e["loss"]) for e in steps if e["loss"] is not None]
    validations = [(e["step"], e["loss"]) for e in events if e["kind"] == "validation" and e["loss"] is not None]
    if good:
        x, y = zip(*good, strict=True)
        axes.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
        axes.plot(x, running_mean(y, span=max(2, len(y) // 60)), color="tab:blue", label="training, running mean")
    if validations:
        x, y = zip(*validations, strict=True)
        axes.plot(x, y, color="tab:red", marker="o", markersize=4, linewidth=1, label="validation")
        axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(-4, 8), textcoords="offset points", ha="right")
    skipped = [e["step"] for e in steps if e["skipped"]]
    if skipped:
        bottom = axes.get_ylim()[0]
        axes.plot(skipped, [bottom] * len(skipped), "kx", clip_on=False, label="skipped (gradient not finite)")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(_title(events))
    axes.grid(alpha=0.3)
    if good or validations:
        axes.legend()


def running_mean(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential mean over about ``span`` steps, without bias at the start."""
    decay = 1 - 1 / span
    total = weight = 0.0
    means: list[float] = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def _title(events: Sequence[Event]) -> str:
    head = next((e for e in events if e["kind"] == "run"), None)
    if head is None:
        return "training"
    config = head["config"]
    size, model = head["parameters"], Path(config["model"]["name"]).name
    scale = min(int(math.log10(max(size, 1)) // 3), 3)
    return (
        f"{config['optimizer']['name']} on {head['data']['name']}, {model} "
        f"({size / 1000**scale:.3g}{['', 'K', 'M', 'B'][scale]} parameters)"
    )
