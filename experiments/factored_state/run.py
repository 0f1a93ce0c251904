"""Momentum as factors in 8 bits and a rest in 4: what it would cost in loss, before anybody builds it.

    python experiments/factored_state/run.py run      width 64, 300 steps, seeds 0, 1, 2; what is there is not run again
    python experiments/factored_state/run.py table

`factored`: M (m, n) is kept as Q C + E: Q (m, r) is the basis that the rule keeps anyway, made orthonormal, C = QᵀM
(r, n) in 8 bits and E = M - Q C in 4, each linear, with a scale for the largest entry of each stretch of a row: 2,048
entries and 128. Bits an entry of M, at rank r: 8 r / m + 4, beside the scales. `4 bits` keeps M itself so, without
factors; `momentum` keeps M in 8 bits and Q in float32; `int8` is the library's own, which keeps both in 8 bits.

Of the others momentum is float32 and rounded to what would be kept after every step, which changes what training sees
and nothing else. (Of the runs that are kept, M in `momentum` was rounded by the library, which did not pack Q then, and
of DionTail Q in `int8` outside of it.) All settings are those that experiments/tuned/run.py found for each rule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tuned"))
from run import SEEDS, Kept, Runs, configured, events_of, least, tuned  # noqa: E402 (it lies there)

FORMS = ("float32", "momentum", "int8", "factored", "4 bits")


def kept(X: Tensor, bits: int, stretch: int) -> Tensor:
    """Round X (m, n) to what so many bits an entry hold."""
    most = 2 ** (bits - 1) - 1
    parts = list(X.split(stretch, dim=1))
    scales = [part.abs().amax(1, keepdim=True).clamp(min=torch.finfo(X.dtype).tiny) / most for part in parts]
    return torch.cat([(part / scale).round() * scale for part, scale in zip(parts, scales, strict=True)], 1)


def factored(M: Tensor, Q: Tensor) -> Tensor:
    """Round M to what its factors and the rest hold. Q is (m, r) or (n, r): the rule's basis is of either side."""
    if Q.shape[0] != M.shape[0]:
        return factored(M.mT, Q).mT
    basis = torch.linalg.qr(Q)[0]
    low = basis @ kept(basis.mT @ M, 8, 2048)
    return low + kept(M - low, 4, 128)


@contextmanager
def rounded(form: str) -> Iterator[None]:
    """Round the momenta of every optimizer, after each step within, to what ``form`` keeps."""
    keep = {
        "momentum": lambda held: kept(held["momentum"], 8, 2048),
        "factored": lambda held: factored(held["momentum"], held["Q"]),
        "4 bits": lambda held: kept(held["momentum"], 4, 128),
    }

    def after(optimizer: Any, *_: Any) -> None:
        for held in optimizer.state.values():
            if "momentum" in held:
                held["momentum"].copy_(keep[form](held))

    handle = register_optimizer_step_post_hook(after) if form in keep else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    options.add_argument("--only", nargs="*", default=["tail-1/4", "tail-1/16", "dion-1/4"])
    given, protocol = options.parse_args(), Runs()
    kept_runs = Kept(HERE / "results.jsonl", itemgetter("label", "form", "seed"))
    found = {name: one["loss"] for name, one in kept_runs.found.items()}
    for label in given.only:
        settings = tuned(protocol, label)
        for form in FORMS:
            for seed in SEEDS:
                if form == "float32":
                    found[label, form, seed] = protocol.loss(label, settings, seed)
                if (label, form, seed) in found or given.what == "table":
                    continue
                wanted = {**settings, "state_dtype": "int8"} if form == "int8" else settings
                with rounded(form):
                    loss = least(events_of(configured(wanted, seed)))
                found[label, form, seed] = loss
                kept_runs.add({"label": label, "form": form, "seed": seed, "loss": loss})
    print("| | momentum | seeds 0, 1, 2 | mean | minus float32, seed by seed |\n|---|---|---|---:|---|")
    for label in given.only:
        for form in FORMS:
            losses = [found[label, form, seed] for seed in SEEDS if (label, form, seed) in found]
            if len(losses) == len(SEEDS):
                less = [loss - found[label, "float32", seed] for loss, seed in zip(losses, SEEDS, strict=True)]
                shown = f"{', '.join(f'{x:.3f}' for x in losses)} | {sum(losses) / 3:.3f}"
                print(f"| {label} | {form} | {shown} | {', '.join(f'{x:+.3f}' for x in less)} |")


if __name__ == "__main__":
    main()
