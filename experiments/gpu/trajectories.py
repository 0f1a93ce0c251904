"""Whether a training run notices how columns are made orthonormal: losses of 300 steps under three forms of it.

    python experiments/gpu/trajectories.py run
    python experiments/gpu/trajectories.py table

`orthoshard train --model tiny` and `small`, rank 1/4, three seeds, validated every 25 steps; the figure is the least
validation loss. Forms: "exact", all of the orthonormalization in float64; "cpu", what a CPU does; "device", what a GPU
does, on this CPU: a Gram matrix in float64 at once, few reads, and products with momentum from float16 operands;
"another Q", exact from another initial Q, which shows by how much runs of one seed may differ at all.
Runs in trajectories.jsonl are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from itertools import product
from operator import itemgetter
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from orthoshard.directions import low_rank, seen
from orthoshard.linalg import cholesky
from orthoshard.linalg.small import at_once

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tuned"))

from run import SEEDS, Kept, configured, events_of, least  # noqa: E402

FORMS = ("exact", "device", "cpu", "another Q")
NAMES = {"DionTail 1/4": "dion_tail", "Dion 1/4": "dion"}
MODELS = ("tiny", "small")


@contextmanager
def orthonormal_by(form: str) -> Generator[None]:
    def exact(y: Tensor, noise: float) -> Tensor:
        return cholesky.cholesky_qr(y.double(), noise).to(y.dtype)

    with ExitStack() as stack:
        if form in ("exact", "another Q"):
            stack.enter_context(patch.object(low_rank, "cholesky_qr_work", at_once(exact)))
        if form == "device":
            stack.enter_context(patch.object(cholesky, "sync_is_free", lambda _: False))
            stack.enter_context(patch.object(seen, "narrow_dtype", lambda *_: torch.float16))
        yield


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    options.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    given, kept = options.parse_args(), Kept(HERE / "trajectories.jsonl", itemgetter("model", "rule", "form", "seed"))
    for run in product(given.models, NAMES, FORMS, SEEDS) if given.what == "run" else ():
        if run not in kept.found:
            model, rule, form, seed = run
            settings = {"name": NAMES[rule], "rank_fraction": 1 / 4}
            if form == "device":  # its noise floor is that of rounded operands
                settings["matmul_precision"] = "tf32"
            if form == "another Q":
                settings["seed"] = 1
            with orthonormal_by(form):
                loss = least(events_of(configured(settings, seed, model=model)))
            kept.add({"model": model, "rule": rule, "form": form, "seed": seed, "loss": loss})
    print("| model | rule | exact | form | minus exact | mean |\n|---|---|---|---|---|---:|")
    for model, rule, form in product(given.models, NAMES, FORMS[1:]):
        runs = [[kept.found.get((model, rule, one, seed)) for seed in SEEDS] for one in (FORMS[0], form)]
        exact, mine = ([run["loss"] for run in each if run] for each in runs)
        if len(exact) == len(mine) == len(SEEDS):
            apart = [b - a for a, b in zip(exact, mine, strict=True)]
            cells = ", ".join(f"{loss:.3f}" for loss in exact), form, ", ".join(f"{each:+.4f}" for each in apart)
            print(f"| {model} | {rule} | {' | '.join(cells)} | {statistics.mean(apart):+.4f} |")


if __name__ == "__main__":
    main()
