"""Does the flatness of what a rank leaves predict the loss that the rank costs?

    python experiments/flatness/run.py run      width 64, 300 steps; what is there is not run again
    python experiments/flatness/run.py table

DionTail as experiments/tuned/run.py tuned it at rank 1/4, and from there

kinds   the matrices of one kind (q_proj, ... down_proj) at rank 1/64, which is one column, all others at 1/4; seeds 0
        to 4. Its cost is the least validation loss less that of rank 1/4 everywhere, of the same seed.
ranks   all matrices at 1/2, 1/8, 1/16, 1/32, 1/64; seeds 0, 1, 2.
rates   q_proj or k_proj at half or twice the rate of the others, rank 1/4 everywhere; seeds 0, 1, 2. Added when the
        first runs of `kinds` had shown a lower loss for these two at rank 1/64.

The predictors are means over the diagnostics of every 25th step from step 100 on and over the matrices of that rank,
of the same runs: `tail_flatness`, |E|_F^4 / (|E Eᵀ|_F^2 (d - r)) of what the rank leaves, which DionTail takes for
flat, and `captured`, the share of the momentum's energy that it does not leave. Spearman's rank correlation over the
seven kinds; with seven, |0.79| or more is unlikely by chance (5 %, two-sided).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tuned"))
from run import Kept, KnownRuns, configured, events_of, least, tuned  # noqa: E402 (it lies there)

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (0.5, 0.125, 0.0625, 0.03125, 0.015625)
OTHER_RATES = [(kind, by) for by in (0.5, 2.0) for kind in ("q_proj", "k_proj")]
PREDICTORS = ("tail_flatness", "captured")


def wanted(lr: float) -> list[tuple[str, dict[str, Any], int]]:
    """Yield the runs: a name, what is set beside the tuned settings, the seed. ``lr``: the tuned rate."""
    of_kinds = [(kind, {"overrides": {f"*{kind}*": {"rank_fraction": 1 / 64}}}, s) for kind in KINDS for s in range(5)]
    of_ranks = [(f"rank {rank:g}", {"rank_fraction": rank}, seed) for rank in RANKS for seed in range(3)]
    of_rates = [
        (f"{kind}, rate x {by:g}", {"overrides": {f"*{kind}*": {"lr": lr * by}}}, seed)
        for kind, by in OTHER_RATES
        for seed in range(3)
    ]
    return [("rank 0.25", {}, seed) for seed in range(5)] + of_kinds + of_rates + of_ranks


def measured(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    config = configured(settings, seed)
    config = replace(config, record=replace(config.record, diagnostics=25))
    events = events_of(config)
    seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for event in events:
        if event["kind"] == "diagnostics" and event["step"] >= 100:
            for name, figures in event["parameters"].items():
                for kind in (kind for kind in KINDS if kind in name):
                    seen[kind].append({key: figures[key] for key in PREDICTORS if figures[key] is not None})
    means = {
        kind: {key: statistics.fmean(one[key] for one in all_of_them if key in one) for key in PREDICTORS}
        for kind, all_of_them in seen.items()
    }
    return {"loss": least(events), "figures": means}


def correlation(xs: list[float], ys: list[float]) -> float:
    """Return Spearman's correlation, that of the ranks."""
    return statistics.correlation(*([sorted(values).index(value) for value in values] for values in (xs, ys)))


def table(found: dict[tuple[str, int], dict[str, Any]]) -> None:
    def costs(name: str, seeds: int) -> list[float]:
        return [found[name, seed]["loss"] - found["rank 0.25", seed]["loss"] for seed in range(seeds)]

    def mean(name: str, kind: str, key: str, seeds: int) -> float:
        return statistics.fmean(found[name, seed]["figures"][kind][key] for seed in range(seeds))

    print("| at rank 1/64 | cost by seed | mean | tail_flatness | captured |\n|---|---|---:|---:|---:|")
    known = [kind for kind in KINDS if all((kind, seed) in found for seed in range(5))]
    for kind in known:
        each = costs(kind, 5)
        flat, captured = (mean(kind, kind, key, 5) for key in PREDICTORS)
        shown = ", ".join(f"{cost:+.3f}" for cost in each)
        print(f"| {kind} | {shown} | {statistics.fmean(each):+.4f} | {flat:.3f} | {captured:.3f} |")
    if len(known) == len(KINDS):
        for key, kinds in ((key, kinds) for key in PREDICTORS for kinds in (KINDS, KINDS[2:])):
            mean_costs = [statistics.fmean(costs(kind, 5)) for kind in kinds]
            by_kind = [mean(kind, kind, key, 5) for kind in kinds]
            spearman = correlation(mean_costs, by_kind)
            print(f"\ncost and {key} of {len(kinds)} kinds from {kinds[0]} on: Spearman {spearman:+.2f}")
    for kind, by in OTHER_RATES:
        name = f"{kind}, rate x {by:g}"
        if all((name, seed) in found for seed in range(3)):
            print(f"\n{name}: {', '.join(f'{cost:+.3f}' for cost in costs(name, 3))}")
    print("\n| all at rank | cost by seed | mean | tail_flatness | captured |\n|---|---|---:|---:|---:|")
    for rank in RANKS:
        name = f"rank {rank:g}"
        if all((name, seed) in found for seed in range(3)):
            each = costs(name, 3)
            flat, captured = (statistics.fmean(mean(name, kind, key, 3) for kind in KINDS) for key in PREDICTORS)
            shown = ", ".join(f"{cost:+.3f}" for cost in each)
            print(f"| {rank:g} | {shown} | {statistics.fmean(each):+.4f} | {flat:.3f} | {captured:.3f} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    given = options.parse_args()
    kept = Kept(HERE / "results.jsonl", itemgetter("name", "seed"))
    if given.what == "run":
        settings = tuned(KnownRuns(), "tail-1/4")
        for name, more, seed in wanted(settings["lr"]):
            if (name, seed) not in kept.found:
                kept.add({"name": name, "seed": seed, **measured({**settings, **more}, seed)})
    table(kept.found)


if __name__ == "__main__":
    main()
