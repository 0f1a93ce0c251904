"""What closes the distance of DionTail at rank 1/16 to Muon?

    python experiments/tuned/sixteenth.py run [--only NAME ...]
    python experiments/tuned/sixteenth.py table

Width 64, 300 steps, DionTail 1/16 as run.py tuned it, with one thing changed: each at the tuned rate, at the square
root of 2 less and more, and on at either edge (seed 0), the best of these on seeds 1 and 2. The figure is the least
validation loss, of which that of rank 1/16 as it is, and that of the tuned Muon, of the same seed are subtracted. The
price is the floating-point operations of a step, over those of rank 1/16 as it is; the plain forms of `variants.py`
have none. Runs in sixteenth.jsonl are not run again.

Amended after the first change had run, which was best at the highest of three rates: the search goes on at an edge.
Queries and keys at twice the rate, values or outputs alone, feed-forward matrices, values and outputs at 1/2 and the
shorter side were added after the first results, each before its own runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from run import SEEDS, Kept, KnownRuns, Missing, configured, events_of, least, tuned
from torch.optim.optimizer import register_optimizer_step_post_hook

from orthoshard import DionTail
from orthoshard.budget import step_cost
from orthoshard.lab.models.described import describe

sys.path.insert(0, str(Path(__file__).parents[2]))
import experiments.dion_tail.variants  # noqa: F401 (registers `tail_variant`)

STEPS = 300
VARIANT = {"name": "tail_variant"}


def at_rank(fraction: float, *kinds: str) -> dict[str, Any]:
    return {f"*{kind}*": {"rank_fraction": fraction} for kind in kinds}


CHANGES: dict[str, dict[str, Any]] = {
    "tail x 0.5": {"tail_weight": 0.5},
    "tail x 0.7": {"tail_weight": 0.7},
    "tail x 1.4": {"tail_weight": 1.4},
    "tail x its flatness": {**VARIANT, "tail": "flatness"},
    "values and outputs 1/4": {"overrides": at_rank(1 / 4, "v_proj", "o_proj")},
    "values and outputs 1/4, queries and keys 1/64": {
        "overrides": at_rank(1 / 4, "v_proj", "o_proj") | at_rank(1 / 64, "q_proj", "k_proj")
    },
    "values and outputs 1/4, others 1/64": {
        "rank_fraction": 1 / 64,
        "overrides": at_rank(1 / 4, "v_proj", "o_proj"),
    },
    "values and outputs 1/2, others 1/64": {
        "rank_fraction": 1 / 64,
        "overrides": at_rank(1 / 2, "v_proj", "o_proj"),
    },
    "values and outputs 1/4, others 1/64, queries and keys at twice the rate": {
        "rank_fraction": 1 / 64,
        "overrides": at_rank(1 / 4, "v_proj", "o_proj") | {"*q_proj*": {"lr_factor": 2}, "*k_proj*": {"lr_factor": 2}},
    },
    "values and outputs 1/2": {"overrides": at_rank(1 / 2, "v_proj", "o_proj")},
    "feed-forward matrices 1/4": {"overrides": at_rank(1 / 4, "gate_proj", "up_proj", "down_proj")},
    "values 1/4": {"overrides": at_rank(1 / 4, "v_proj")},
    "outputs 1/4": {"overrides": at_rank(1 / 4, "o_proj")},
    "tail by its shorter side": {**VARIANT, "tail": "shorter"},
    "tail in blocks of d/16": {**VARIANT, "tail": "blocks", "block": 1 / 16},
    "tail in blocks of d/8": {**VARIANT, "tail": "blocks", "block": 1 / 8},
    "tail in blocks of d/4": {**VARIANT, "tail": "blocks", "block": 1 / 4},
    "first third at 1/4": {"switch": [1 / 4, 100, 1 / 16]},
    "last third at 1/4": {"switch": [1 / 16, 200, 1 / 4]},
}


@contextmanager
def switched(switch: list[float] | None):
    """Let the rank of every optimizer that steps go from one fraction to another after so many steps."""
    taken = 0

    def after(optimizer: torch.optim.Optimizer, *_) -> None:
        nonlocal taken
        taken += 1
        if switch is None or taken != switch[1]:
            return
        for group in optimizer.param_groups:
            for W in (W for W in group["params"] if "Q" in optimizer.state[W]):
                group["rank_fraction"] = switch[2]
                Q = optimizer.state[W]["Q"]
                r = math.ceil(switch[2] * min(W.shape))
                more = torch.randn(len(Q), max(0, r - Q.shape[1]))
                optimizer.state[W]["Q"] = torch.cat([Q[:, :r], more], 1)

    hook = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        hook.remove()


def loss_of(settings: dict[str, Any], seed: int, **shape: Any) -> float | None:
    switch = settings.get("switch")
    plain = {name: value for name, value in settings.items() if name != "switch"}
    if switch is not None:
        plain["rank_fraction"] = switch[0]
    with switched(switch):
        return least(events_of(configured(plain, seed, **shape)))


def price(settings: dict[str, Any]) -> float | None:
    """Return the mean floating-point operations of a step on the matrices of the model, by the step run dry; None for
    the plain form of a variant."""
    if settings["name"] != "dion_tail":
        return None
    if "switch" in settings:
        before, at, after = settings["switch"]
        each = [price({"name": "dion_tail", "rank_fraction": fraction}) or 0.0 for fraction in (before, after)]
        return (each[0] * at + each[1] * (STEPS - at)) / STEPS
    options = {name: settings[name] for name in ("rank_fraction", "overrides") if name in settings}
    optimizer = DionTail(describe("nano").on_meta(), **options)
    return step_cost(optimizer.plan(), optimizer.param_groups).flops


def best_rate(loss: Callable[[int], float]) -> int:
    """Return the number of steps from the tuned rate to where neither neighbour is better, or after six rates."""
    tried = {times: loss(times) for times in (0, -1, 1)}
    while (best := min(tried, key=lambda times: tried[times])) in (min(tried), max(tried)) and len(tried) < 6:
        times = best - 1 if best == min(tried) else best + 1
        tried[times] = loss(times)
    return best


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    options.add_argument("--only", nargs="*", default=[*CHANGES], choices=[*CHANGES])
    given, runs = options.parse_args(), KnownRuns()
    kept = Kept(Path(__file__).parent / "sixteenth.jsonl", itemgetter("change", "times", "seed"))
    settings = tuned(runs, "tail-1/16")

    def loss(change: str, times: int, seed: int) -> float:
        if (change, times, seed) not in kept.found:
            if given.what == "table":
                raise Missing
            rate = settings["lr"] * math.sqrt(2) ** times
            found = loss_of({**settings, **CHANGES[change], "lr": rate}, seed)
            kept.add({"change": change, "times": times, "seed": seed, "loss": found})
        found = kept.found[change, times, seed]["loss"]
        return math.inf if found is None else found

    plain = price(settings) or math.inf
    others = [[runs.loss("", tuned(runs, label), seed) for seed in SEEDS] for label in ("tail-1/16", "muon")]
    print("| change | price | rate | seeds 0, 1, 2 | mean | minus rank 1/16 as it is | minus Muon |")
    print("|---|---:|---:|---|---:|---|---|")
    for change in given.only:
        try:
            times = best_rate(lambda times, change=change: loss(change, times, 0))
            losses = [loss(change, times, seed) for seed in SEEDS]
        except Missing:
            continue
        less = [", ".join(f"{a - b:+.3f}" for a, b in zip(losses, other, strict=True)) for other in others]
        shown = ", ".join(f"{one:.3f}" for one in losses)
        rate = settings["lr"] * math.sqrt(2) ** times
        cost = price({**settings, **CHANGES[change]})
        relative = "" if cost is None else f"{cost / plain:.2f}"
        cells = (change, relative, f"{rate:.3g}", shown, f"{statistics.fmean(losses):.3f}", *less)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
