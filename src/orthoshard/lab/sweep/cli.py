"""``orthoshard sweep``: the flags, the checks before the first run, and what is shown at the end.

Exit codes: 0 done, 1 some runs broke and can be tried again, 2 something to put right, 130 and 143 stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from orthoshard.lab.bench import environment
from orthoshard.lab.bench.files import write_json
from orthoshard.lab.compare.comparison import comparable, differences, make_folder
from orthoshard.lab.compare.display import Clock, display
from orthoshard.lab.compare.pool import Start, lock, run_all, start_process
from orthoshard.lab.compare.settings import ManyRuns
from orthoshard.lab.compare.stopping import exit_code
from orthoshard.lab.sweep import space as spaces
from orthoshard.lab.sweep.report import flags, heat_map, table, to_json
from orthoshard.lab.sweep.space import Space
from orthoshard.lab.sweep.study import RUNS, Found, Pruning, Search
from orthoshard.lab.train.cli import value_of
from orthoshard.lab.train.config import (
    OptimizerConfig,
    RecordConfig,
    TrainConfig,
    share,
)
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.presets import load_preset

SETTINGS = "sweep.json"
WIDTH = 120  # of the table where there is no terminal to ask


@dataclass(frozen=True)
class Command(ManyRuns):
    """Search learning rates, rank fraction, momentum and weight decay of the training run of `orthoshard train`.

    Every trial is a run of its own. The first are the optimizers' defaults; those that are behind the median of the
    earlier ones are stopped at a validation. Stop it at any moment: the same command goes on, a larger --trials adds
    more. The heat map and every figure are in --out: heatmap.png, results.json; the best is printed as flags for
    `orthoshard train`.

    examples:
      orthoshard sweep --trials 30
      orthoshard sweep --optimizers dion dion_tail muon --trials 60 --jobs 2
      orthoshard sweep --lr 0.005 0.05 --rank-fraction 1/64 1/4 --momentum 0.95 --weight-decay 0.01
    """

    out: Path = Path("runs/sweep")
    """The sweep's folder. It is made, or gone on with."""
    trials: int = 24
    """Runs in all, those already there among them."""
    optimizers: tuple[str, ...] = ("dion",)
    """Which of `dion`, `dion_tail`, `muon` and `adamw`; with several, the optimizer is searched too."""
    lr: tuple[float, ...] = ()
    """Lowest and highest peak learning rate of matrices, or one; by default an eighth to eight times each optimizer's
    own."""
    scalar_lr: tuple[float, ...] = spaces.SCALAR_RATES
    """The same of embeddings, heads, norms and biases."""
    rank_fraction: tuple[str, ...] = ("1/16", "1")
    """Lowest and highest, searched by powers of two, or one value."""
    momentum: tuple[float, ...] = spaces.MOMENTUM
    """Lowest and highest, or one value."""
    weight_decay: tuple[float, ...] = spaces.WEIGHT_DECAY
    """Lowest and highest, or one value."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How trials are drawn: by what the earlier ones taught (tree-structured Parzen estimator), or blindly."""
    no_prune: bool = False
    """Let every run go on to its end."""
    seed: int = 0
    """Of the trials and of every run."""
    jobs: int = 1
    """Runs at the same time. They share the cores."""
    report_only: bool = False
    """Run nothing: make heat map, table and JSON anew from what has been run in --out, under the same flags."""


def main(argv: Sequence[str] | None = None, start: Start = start_process) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code("sweep", lambda: _main(parse(arguments), start))


def parse(arguments: Sequence[str]) -> Command:
    base = load_preset(value_of("--preset", arguments) or "default")
    return tyro.cli(
        Command,
        prog="orthoshard sweep",
        args=list(arguments),
        default=Command(data=base.data, model=base.model, schedule=base.schedule, machine=base.machine),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _main(command: Command, start: Start) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    space = Space(
        command.optimizers,
        command.lr,
        _fractions(command),
        command.momentum,
        command.weight_decay,
        command.scalar_lr,
    )
    base = _base(command)
    for name, number in (("trials", command.trials), ("jobs", command.jobs)):
        if number < 1:
            raise UserError(f"--{name} is {number}; give a whole number of at least 1.")
    base.check()
    space.check()
    settings = _read(command.out) if command.report_only else None
    digest = settings["digest"] if settings else _try(base, space)
    make_folder(command.out)
    with lock(command.out, lambda: print(f"waiting for another sweep in {command.out} to end")) as keep_open:
        _claim(command, base, space, digest)
        prune = not command.no_prune
        search = Search(command.out, base, space, command.trials, command.seed, command.sampler, prune, digest)
        broken = [] if command.report_only else _run(console, search, command.jobs, start, keep_open)
        _show(console, command, search)
    for sentence in broken:
        print(f"orthoshard sweep: {sentence}", file=sys.stderr)
    return 1 if broken else 0


def _run(console: Console, search: Search, parallel: int, start: Start, keep_open: Sequence[int]) -> list[str]:
    def counts() -> tuple[int, int]:
        return search.done(), max(search.trials, search.drawn())

    with display(console, counts, Clock(parallel)) as shown:
        runs = search.folder / RUNS
        listener = Pruning(search, shown)
        return run_all(lambda: search.wanted(parallel), runs, parallel, listener, start=start, keep_open=keep_open)


def _show(console: Console, command: Command, search: Search) -> None:
    """The files, the table, and the best as a command."""
    found, out = search.found(), command.out
    if not found:
        raise UserError(f"there is no trial in {out} yet; start without --report-only.")
    best = found[0] if found[0].status == "finished" else None
    again = best and flags(_config(search.base, best), load_preset(command.preset), command.preset)
    results = {"report": environment.describe(), **_settings(command, search.base, search.space, search.digest)}
    write_json(out / "results.json", results | {"best": again, "trials": to_json(found)}, indent=None)
    draft = out / ".heatmap.png"
    heat_map(found, draft)
    draft.replace(out / "heatmap.png")
    console.print(table(found))
    numbers = {status: sum(row.status == status for row in found) for status in dict.fromkeys(r.status for r in found)}
    console.print(
        f"{len(found)} trials: {', '.join(f'{count} {status}' for status, count in numbers.items())}. "
        f"In {out}: heatmap.png, results.json",
        highlight=False,
        soft_wrap=True,
    )
    if best and again:
        first = next((row for row in found if row.number == 0), best)
        than = "" if first.loss is None or first is best else f", the first trial's {first.loss:.4f}"
        console.print(f"Best loss {best.loss:.4f}{than}. Train with it:", highlight=False, soft_wrap=True)
        console.print(again, highlight=False, soft_wrap=True, markup=False)


def _config(base: TrainConfig, found: Found) -> TrainConfig:
    return dataclasses.replace(base, optimizer=found.optimizer)


def _base(command: Command) -> TrainConfig:
    """Every trial's settings but for its optimizer. Runs at the same time divide the cores among them."""
    machine = command.machine
    if command.jobs > 1 and not machine.threads:
        machine = dataclasses.replace(machine, threads=max(1, (os.cpu_count() or 1) // command.jobs))
    kept = RecordConfig(
        validate_every=command.validate_every,
        validation_batches=command.validation_batches,
        checkpoint_every=command.checkpoint_every,
        keep=1,
        sample_tokens=0,
    )
    return TrainConfig(
        command.data, command.model, OptimizerConfig(), command.schedule, kept, machine, seed=command.seed
    )


def _fractions(command: Command) -> tuple[float, ...]:
    try:
        return tuple(share(text) for text in command.rank_fraction)
    except ValueError:
        given = " ".join(command.rank_fraction)
        raise UserError(f"--rank-fraction {given}: give shares above 0, at most 1, such as 1/64 1/4.") from None


def _settings(command: Command, base: TrainConfig, space: Space, digest: str) -> dict[str, Any]:
    made = {"base": comparable(base), "space": dataclasses.asdict(space), "seed": command.seed, "digest": digest}
    return json.loads(json.dumps(made))  # as it will be read


def _claim(command: Command, base: TrainConfig, space: Space, digest: str) -> None:
    """Writes the settings, if the folder is new or holds a sweep that this one continues. More trials, another sampler
    or pruning continue it; another space, model or text does not. Raises ``UserError``."""
    path, here = command.out / SETTINGS, _settings(command, base, space, digest)
    if path.exists():
        for name, mine, there in differences(here, _read(command.out)):
            raise UserError(
                f"{command.out} holds a sweep with {name} = {there!r}, and here it is {mine!r}; give the same flags to "
                "go on, or another folder with --out."
            )
    write_json(path, here)


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / SETTINGS
    try:
        found: Any = json.loads(path.read_text())
        return {key: found[key] for key in ("base", "space", "seed", "digest")}
    except FileNotFoundError:
        raise UserError(f"there is no sweep in {folder}; start one without --report-only.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a sweep's settings ({error}); give another folder with --out.") from error


def _try(base: TrainConfig, space: Space) -> str:
    """Prepares the data and builds every optimizer once, so that what is wrong shows before the first run. Returns the
    digest of the data."""
    from orthoshard.lab.train.data import prepare
    from orthoshard.lab.train.machine import device_of
    from orthoshard.lab.train.model import build_model, own_tokenizer
    from orthoshard.lab.train.optimizers import build_optimizer

    device_of(base.machine)
    data = prepare(base.data, own_tokenizer(base.model))
    model = build_model(base.model, data.vocabulary, base.seed)
    for name in space.optimizers:
        build_optimizer(model, space.default(name))
    return data.digest
