"""The loss that each tuned optimizer reaches beside what its step costs: one plot, one table.

    python experiments/tuned/plot.py time      step times on this machine, all in turn, to times.json: on quiet cores
    python experiments/tuned/plot.py draw      loss-by-cost.svg beside this file, and the table of docs/evidence.md

Losses are means over seeds 0, 1, 2 of what run.py tuned at width 64, of the optimizers whose runs are complete. Costs
are those of the matrices of GPT-2 small's first four layers in float32: floating-point operations by the step run dry,
and milliseconds of the optimizer's own step on a CPU. AdamW is torch's fused form there, whose flops are not counted.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import DEFAULTS, START, KnownRuns, Missing, Settings, row, tuned
from torch import nn

from orthoshard import RuleOptimizer
from orthoshard.budget import step_cost
from orthoshard.lab import canvas
from orthoshard.lab.bench.contestants import Contestant
from orthoshard.lab.bench.measure import Plan, measure
from orthoshard.lab.bench.models import find_model

HERE = Path(__file__).parent
TIMES, FIGURE = HERE / "times.json", HERE / "loss-by-cost.svg"
NOT_OF_THE_RULE = ("name", "scalar_lr", "beta1", "beta2")


def options(settings: Settings) -> dict[str, Any]:
    """Return those of the settings that the rule itself takes."""
    kept = {**DEFAULTS, **settings}
    return {"rule": kept["name"]} | {key: kept[key] for key in kept if key not in NOT_OF_THE_RULE}


def contestant(label: str, settings: Settings) -> Contestant:
    if label == "adamw":
        return Contestant(label, 3, optimizer=partial(torch.optim.AdamW, lr=settings["lr"], fused=True))
    return Contestant(label, 3, optimizer=partial(RuleOptimizer, **options(settings)))


def gigaflops(settings: Settings) -> float | None:
    if settings["name"] == "adamw":
        return None
    shapes = find_model("gpt2-small").first(4).matrices
    optimizer = RuleOptimizer([nn.Parameter(torch.empty(m, n)) for m, n in shapes], **options(settings))
    return step_cost(optimizer.plan(), optimizer.param_groups).flops / 1e9


def finished(runs: KnownRuns) -> dict[str, tuple[Settings, float]]:
    """Return the tuned settings and the mean loss of each optimizer whose runs are complete."""
    found: dict[str, tuple[Settings, float]] = {}
    for label in START:
        try:
            settings = tuned(runs, label)
        except Missing:
            continue
        if losses := row(runs, {**DEFAULTS, **settings}):
            found[label] = settings, sum(losses) / len(losses)
    return found


def time(found: dict[str, tuple[Settings, float]]) -> None:
    contestants = [contestant(label, settings) for label, (settings, _) in found.items()]
    shapes = find_model("gpt2-small").first(4)
    seen = measure(Plan(shapes, contestants, torch.device("cpu"), torch.float32, seconds=90.0, peak=False))
    seen["command"] = "python experiments/tuned/plot.py time"
    TIMES.write_text(json.dumps(seen, indent=1) + "\n")


def draw(found: dict[str, tuple[Settings, float]]) -> None:
    rows = json.loads(TIMES.read_text())["contestants"]
    costs = {label: (gigaflops(settings), rows[label]["median_ms"]) for label, (settings, _) in found.items()}
    looks = canvas.styles([*found])

    def fill(figure: Any) -> None:
        headings = ("GFLOP a step, run dry", "ms a step, 2 CPU cores")
        for which, axes in enumerate(canvas.panels(figure, 2, share_y=True)):
            for label, (_, loss) in found.items():
                if (cost := costs[label][which]) is not None:
                    axes.plot([cost], [loss], label=label, **{**looks[label], "linestyle": "none"})
            axes.set_xscale("log")
            axes.set_xlabel(headings[which])
        figure.axes[0].set_ylabel("validation loss, nats a token")
        figure.axes[1].legend(ncols=2)

    FIGURE.write_text(canvas.svg(fill, *canvas.size(2)))
    print("| optimizer | loss | GFLOP | ms |\n|---|---:|---:|---:|")
    for label, (_, loss) in sorted(found.items(), key=lambda item: item[1][1]):
        flops, ms = costs[label]
        print(f"| {label} | {loss:.3f} | {'' if flops is None else f'{flops:.0f}'} | {ms:.0f} |")


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("what", choices=("time", "draw"))
    found = finished(KnownRuns())
    (time if given.parse_args().what == "time" else draw)(found)


if __name__ == "__main__":
    main()
