"""Every optimizer tuned by one declared protocol, then each stage on top of it.

    python experiments/tuned/run.py tune   [--only muon tail-1/4]
    python experiments/tuned/run.py stages [--only ...] [--stage row_moment ...]
    python experiments/tuned/run.py table                       what has been run: the tables of docs/evidence.md

The protocol, which was committed before the first run:

run     `orthoshard compare --model nano`'s: Shakespeare, width 64, 300 steps of 16 x 128 tokens, warm-up 20, then
        linear to 0. Its figure is the least validation loss of a run, nats a token, validated every 25 steps.
start   the best pair of rates of the committed comparison (benchmarks/results/compare-shakespeare-width-64), all else
        the library's defaults. Of the rivals that came later (Dion3, NorMuon, RowNorm, Nora) the library's rate, and
        Muon's for all else.
tune    on seed 0, one setting after the other in the order of `ORDER`: from where the setting is, to the next higher
        value of its ladder while the loss falls; if the first was no better, to the next lower ones.
        The same ladders for every optimizer; AdamW has no momentum but two betas, of matrices as of all else.
        Amended after the runs of `tune` for muon, tail-1/4, tail-1/16 and adamw: the first beta of what AdamW trains,
        0.95 until then, which was no baseline for AdamW itself (0.9 gave 0.03 less), is tuned last, for all, and then
        both rates once more. Its ladder ended at 0.8 in the first runs of AdamW, which was best, and goes on to 0.6.
report  start and end on seeds 0, 1, 2: what tuning alone was worth.
stages  at the end of tuning: each stage alone, nanochat's stack, and momentum in 8 bits, at half, once and twice the
        rate on seed 0, on at either edge; the best rate on seeds 0, 1, 2. A difference is claimed where all three seeds
        have its sign.

Runs that are in results.jsonl are not run again: stop at any moment, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from orthoshard.lab.train import record
from orthoshard.lab.train.config import OptimizerConfig, TrainConfig
from orthoshard.lab.train.loop import train

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
SEEDS = (0, 1, 2)
Settings = dict[str, Any]

START: dict[str, Settings] = {
    "adamw": {"name": "adamw", "lr": 0.006, "scalar_lr": 0.024},
    "muon": {"name": "muon", "lr": 0.02, "scalar_lr": 0.012},
    "tail-1/4": {"name": "dion_tail", "rank_fraction": 0.25, "lr": 0.02, "scalar_lr": 0.012},
    "tail-1/16": {"name": "dion_tail", "rank_fraction": 0.0625, "lr": 0.02, "scalar_lr": 0.024},
    "dion-1/4": {"name": "dion", "rank_fraction": 0.25, "lr": 0.02, "scalar_lr": 0.012},
    "dion-1/16": {"name": "dion", "rank_fraction": 0.0625, "lr": 0.02, "scalar_lr": 0.048},
    "normuon": {"name": "normuon", "lr": 0.02, "scalar_lr": 0.012},
    "dion3-1/4": {"name": "dion3", "fraction": 0.25, "lr": 0.02, "scalar_lr": 0.012},
    "dion3-1/8": {"name": "dion3", "fraction": 0.125, "lr": 0.02, "scalar_lr": 0.012},
    "row-norm": {"name": "row_norm", "lr": 0.003, "scalar_lr": 0.012},
    "nora": {"name": "row_norm", "tangent": True, "lr": 0.003, "scalar_lr": 0.012},
}
DEFAULTS: Settings = {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.01, "momentum": 0.95}
LADDERS: dict[str, list[float]] = {
    "beta2": [0.9, 0.95, 0.98, 0.99, 0.995],
    "weight_decay": [0.0, 0.01, 0.03, 0.1, 0.3, 1.0],
    "momentum": [0.8, 0.9, 0.95, 0.98],
    "beta1": [0.6, 0.7, 0.8, 0.9, 0.95],
}
RATES = {"lr": math.sqrt(2), "scalar_lr": 2.0}
ORDER = ("beta2", "weight_decay", "momentum", *RATES, *RATES, "beta1", *RATES)
STAGES: dict[str, Settings] = {
    "equilibrate rows": {"equilibrate": "rows"},
    "row_moment": {"row_moment": 0.95},
    "frobenius": {"frobenius": True},
    "cautious": {"decay": "cautious"},
    "hyperball": {"decay": "hyperball", "weight_decay": 0.0},
    "update_floor": {"update_floor": 0.35, "weight_decay": 0.0},
    "nanochat": {"equilibrate": "rows", "row_moment": 0.95, "frobenius": True, "decay": "cautious"},
    "int8": {"state_dtype": "int8"},
}


def configured(
    settings: Settings,
    seed: int,
    *,
    model: str = "nano",
    steps: int = 300,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    validate_every: int = 25,
) -> TrainConfig:
    given = {**DEFAULTS, **settings}
    betas = [given.pop("beta1"), given.pop("beta2")]
    known = ("name", "rank_fraction", "lr", "scalar_lr", "weight_decay", "momentum")
    options = {key: given[key] for key in given if key not in known}
    if given["name"] == "adamw":
        del given["momentum"]
        options["betas"] = betas
    else:
        options["scalar_betas"] = betas
    own = {key: given[key] for key in known if key in given}
    option = tuple(f"{key}={json.dumps(value)}" for key, value in sorted(options.items()))
    base = TrainConfig()
    return replace(
        base,
        seed=seed,
        optimizer=OptimizerConfig(**own, option=option),
        model=replace(base.model, name=model),
        schedule=replace(base.schedule, steps=steps),
        machine=replace(base.machine, threads=1, device=device, precision=precision),
        record=replace(
            base.record, validate_every=validate_every, checkpoint_every=0, tensorboard=False, sample_tokens=0
        ),
    )


def events_of(config: TrainConfig) -> list[record.Event]:
    """Train, and return what the run recorded. Nothing else of it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        return train(config, Path(folder) / "run").events


def least(events: list[record.Event]) -> float | None:
    """Return the least validation loss of a run; None if it diverged."""
    losses = [loss for step, loss in record.validations(events) if step > 0]
    return min(losses) if all(map(math.isfinite, losses)) else None


def key(settings: Settings, seed: int) -> str:
    return json.dumps([{**DEFAULTS, **settings}, seed], sort_keys=True)


class Kept:
    """Runs in a file, a line of JSON each, by what ``name`` makes of one: what is there is not run again."""

    def __init__(self, path: Path, name: Callable[[Any], Any]) -> None:
        lines = path.read_text().splitlines() if path.is_file() else []
        self.path, self.name = path, name
        self.found: dict[Any, dict[str, Any]] = {name(one): one for one in map(json.loads, lines)}

    def add(self, one: dict[str, Any]) -> None:
        self.found[self.name(one)] = one
        with self.path.open("a") as file:
            file.write(json.dumps(one) + "\n")
        print(one, flush=True)


class Runs(Kept):
    """What has been run, by settings and seed."""

    def __init__(self) -> None:
        super().__init__(RESULTS, lambda one: key(one["settings"], one["seed"]))
        self.commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)

    def loss(self, label: str, settings: Settings, seed: int = 0) -> float:
        """Return the figure of this run. Run it now if it has not been run."""
        if key(settings, seed) not in self.found:
            found = least(events_of(configured(settings, seed)))
            one = {"label": label, "settings": {**DEFAULTS, **settings}, "seed": seed, "loss": found}
            self.add({**one, "commit": self.commit.stdout.strip()})
        loss = self.found[key(settings, seed)]["loss"]
        return math.inf if loss is None else loss


class Missing(Exception):
    """A run that a search wants next, where nothing is to be run."""


class KnownRuns(Runs):
    """The same, but nothing is run: a search that needs another run raises ``Missing``."""

    def loss(self, label: str, settings: Settings, seed: int = 0) -> float:
        if key(settings, seed) not in self.found:
            raise Missing
        return super().loss(label, settings, seed)


def climb(runs: Runs, label: str, settings: Settings, name: str) -> Settings:
    """Move one setting to where neither neighbour on its ladder is better."""

    def moved(by: int) -> Settings | None:
        if name in RATES:
            return {**settings, name: settings[name] * RATES[name] ** by}
        ladder = LADDERS[name]
        at = ladder.index({**DEFAULTS, **settings}[name]) + by
        return {**settings, name: ladder[at]} if 0 <= at < len(ladder) else None

    here = runs.loss(label, settings)
    for way in (1, -1):
        better = False
        while (there := moved(way)) is not None and (loss := runs.loss(label, there)) < here:
            settings, here, better = there, loss, True
        if better:
            break
    return settings


def tuned(runs: Runs, label: str) -> Settings:
    settings = START[label]
    for name in ORDER:
        if (label, name) == ("adamw", "momentum"):
            continue
        settings = climb(runs, label, settings, name)
    return settings


def staged(runs: Runs, label: str, stage: str) -> Settings:
    """Return the settings of a stage at its best rate."""
    settings = {**tuned(runs, label), **STAGES[stage]}
    middle = settings["lr"]
    tried = {lr: runs.loss(f"{label}, {stage}", {**settings, "lr": lr}) for lr in (middle / 2, middle, middle * 2)}
    while (best := min(tried, key=lambda lr: tried[lr])) in (min(tried), max(tried)) and len(tried) < 6:
        lr = best / 2 if best == min(tried) else best * 2
        tried[lr] = runs.loss(f"{label}, {stage}", {**settings, "lr": lr})
    return {**settings, "lr": best}


def row(runs: Runs, settings: Settings) -> list[float] | None:
    """Return the losses of all seeds; None if one has not been run."""
    known = [runs.found.get(key(settings, seed)) for seed in SEEDS]
    return [math.inf if one["loss"] is None else one["loss"] for one in known if one] if all(known) else None


def table(runs: KnownRuns) -> None:
    names = ("optimizer", "lr", "scalar lr", "beta1", "beta2", "decay", "momentum", "seeds 0, 1, 2")
    print(f"| {' | '.join((*names, 'mean ± half the range', 'minus tuned'))} |")
    print("|---" * 10 + "|")
    for label in START:
        shown: list[tuple[str, Any]] = [(f"{label}, start", lambda label=label: START[label])]
        shown.append((f"{label}, tuned", lambda label=label: tuned(runs, label)))
        shown += [
            (f"{label}, {stage}", lambda label=label, stage=stage: staged(runs, label, stage)) for stage in STAGES
        ]
        for name, settings_of in shown:
            try:
                settings = {**DEFAULTS, **settings_of()}
            except Missing:
                continue
            losses = row(runs, settings)
            if losses is None:
                continue
            half = (max(losses) - min(losses)) / 2
            plain = losses if name.endswith(("start", "tuned")) else row(runs, {**DEFAULTS, **tuned(runs, label)})
            less = [f"{loss - other:+.3f}" for loss, other in zip(losses, plain or losses, strict=True)]
            numbers = " | ".join(
                f"{settings[key]:.3g}" for key in ("lr", "scalar_lr", "beta1", "beta2", "weight_decay", "momentum")
            )
            print(
                f"| {name} | {numbers} | {', '.join(f'{x:.3f}' for x in losses)} | {sum(losses) / 3:.3f} ± {half:.3f} "
                f"| {'' if plain is losses else ', '.join(less)} |"
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("tune", "stages", "table"))
    options.add_argument("--only", nargs="*", default=[*START], choices=[*START])
    options.add_argument("--stage", nargs="*", default=[*STAGES], choices=[*STAGES])
    given = options.parse_args()
    if given.what == "table":
        table(KnownRuns())
        return
    runs = Runs()
    for stage in given.stage if given.what == "stages" else (None,):
        for label in given.only:
            if stage is not None and label == "adamw":
                continue
            ends = [START[label], tuned(runs, label)] if stage is None else [staged(runs, label, stage)]
            for settings in ends:
                for seed in SEEDS:
                    runs.loss(label if stage is None else f"{label}, {stage}", settings, seed)


if __name__ == "__main__":
    main()
