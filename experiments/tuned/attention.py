"""Do query and key matrices want another rate than the other matrices?

    python experiments/tuned/attention.py run
    python experiments/tuned/attention.py table

Asked when experiments/flatness had shown that DionTail 1/4 gains by twice the rate for either. Width 64, 300 steps,
each optimizer as run.py tuned it, with q_proj and k_proj together at half, twice, 4 and 8 times the rate of the other
matrices, seeds 0, 1, 2. The figure is the least validation loss, minus that of the same seed at one rate. Runs in
attention.jsonl are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from operator import itemgetter
from pathlib import Path

from run import SEEDS, Kept, KnownRuns, configured, events_of, key, least, tuned

LABELS = ("muon", "tail-1/4", "normuon")
TIMES = (2.0, 4.0, 0.5, 8.0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    given, runs = options.parse_args(), KnownRuns()
    kept = Kept(Path(__file__).parent / "attention.jsonl", itemgetter("label", "times", "seed"))
    wanted = [(label, times, seed) for times in TIMES for label in LABELS for seed in SEEDS]
    for label, times, seed in wanted if given.what == "run" else ():
        if (label, times, seed) not in kept.found:
            settings = tuned(runs, label)
            faster = {"lr": settings["lr"] * times}
            settings = {**settings, "overrides": {"*q_proj*": faster, "*k_proj*": faster}}
            loss = least(events_of(configured(settings, seed)))
            kept.add({"label": label, "times": times, "seed": seed, "loss": loss})
    print("| optimizer | rate of queries and keys | seeds 0, 1, 2 | mean | minus one rate, seed by seed |")
    print("|---|---:|---|---:|---|")
    for label in LABELS:
        for times in sorted(TIMES):
            if all((label, times, seed) in kept.found for seed in SEEDS):
                losses = [kept.found[label, times, seed]["loss"] for seed in SEEDS]
                plain = [runs.found[key(tuned(runs, label), seed)]["loss"] for seed in SEEDS]
                less = ", ".join(f"{loss - other:+.3f}" for loss, other in zip(losses, plain, strict=True))
                shown = ", ".join(f"{loss:.3f}" for loss in losses)
                print(f"| {label} | x {times:g} | {shown} | {statistics.fmean(losses):.3f} | {less} |")


if __name__ == "__main__":
    main()
