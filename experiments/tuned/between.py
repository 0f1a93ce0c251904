"""Width 128, five times as long: the settings that wide.py found at width 256, on three seeds, tuned no further.

    python experiments/tuned/between.py run
    python experiments/tuned/between.py table

`orthoshard train --model tiny`: Shakespeare, 1,500 steps of 16 x 128 tokens, warm-up 20, then linear to 0, float32 on
one CPU thread. The figure is the least validation loss of a run, nats a token, validated every 100 steps. Settings are
those of wide.jsonl with the most seeds, then the least loss on seed 0. `v o 1/4`: values and outputs at rank 1/4, what
sixteenth.py found best at width 64, also with all others at 1/64; `faster`: at the square root of 2 times the rate;
`first third 1/4`, `last third 1/4`: every matrix at rank 1/4 before step 500, or from step 1,000 on.
Runs in between.jsonl are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from operator import itemgetter
from pathlib import Path

from run import SEEDS, Kept, Settings
from sixteenth import at_rank, loss_of

HERE = Path(__file__).parent
STEPS = 1500
CHANGES: dict[str, Settings] = {
    "v o 1/4": {"overrides": at_rank(1 / 4, "v_proj", "o_proj")},
    "others 1/64": {"rank_fraction": 1 / 64},
    "faster": {"lr": 0.02 * math.sqrt(2)},
    "first third 1/4": {"switch": [1 / 4, STEPS // 3, 1 / 16]},
    "last third 1/4": {"switch": [1 / 16, STEPS * 2 // 3, 1 / 4]},
}
LABELS = (
    "muon",
    "tail-1/4",
    "tail-1/16",
    "tail-1/16, v o 1/4",
    "tail-1/16, v o 1/4, faster",
    "tail-1/16, v o 1/4, others 1/64",
    "tail-1/16, first third 1/4",
    "tail-1/16, last third 1/4",
    "adamw",
    "dion-1/4",
)


def best_at_width_256(label: str) -> Settings:
    runs = [json.loads(line) for line in (HERE / "wide.jsonl").read_text().splitlines()]
    runs = [one for one in runs if one["label"] == label and one["model"] == "small" and one["loss"] is not None]

    def order(one: dict[str, object]) -> tuple[int, object]:
        return -len({other["seed"] for other in runs if other["settings"] == one["settings"]}), one["loss"]

    return min((one for one in runs if one["seed"] == 0), key=order)["settings"]


def settings_of(label: str) -> Settings:
    rule, *changes = label.split(", ")
    settings = best_at_width_256(rule)
    for change in changes:
        settings = {**settings, **CHANGES[change]}
    return settings


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    options.add_argument("--only", nargs="*", default=[*LABELS], choices=[*LABELS])
    options.add_argument("--seeds", nargs="*", type=int, default=[*SEEDS])
    given, kept = options.parse_args(), Kept(HERE / "between.jsonl", itemgetter("label", "seed"))
    found = kept.found
    for label, seed in ((label, seed) for label in given.only for seed in given.seeds if given.what == "run"):
        if (label, seed) not in found:
            settings = settings_of(label)
            loss = loss_of(settings, seed, model="tiny", steps=STEPS, validate_every=100)
            kept.add({"label": label, "seed": seed, "settings": settings, "loss": loss})
    print("| optimizer | seeds 0, 1, 2 | mean | minus Muon, seed by seed |\n|---|---|---:|---|")
    for label in LABELS:
        if all((label, seed) in found for seed in SEEDS):
            losses = [found[label, seed]["loss"] for seed in SEEDS]
            less = ", ".join(f"{loss - found['muon', seed]['loss']:+.3f}" for seed, loss in enumerate(losses))
            shown = ", ".join(f"{loss:.3f}" for loss in losses)
            print(f"| {label} | {shown} | {statistics.fmean(losses):.3f} | {less if label != 'muon' else ''} |")


if __name__ == "__main__":
    main()
