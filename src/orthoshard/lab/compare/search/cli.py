"""``orthoshard compare --search``: the flags, the checks before the first run, and the report at the end."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from orthoshard.lab.bench import environment
from orthoshard.lab.compare import settings
from orthoshard.lab.compare.cli import tell
from orthoshard.lab.compare.comparison import comparable
from orthoshard.lab.compare.display import Clock, display
from orthoshard.lab.compare.folder import RUNS, Folder
from orthoshard.lab.compare.pool import Start, run_all, start_process
from orthoshard.lab.compare.search import space as spaces
from orthoshard.lab.compare.search.shown import flags, heat_map, row_of, table
from orthoshard.lab.compare.search.space import Space
from orthoshard.lab.compare.search.trials import Pruning, Search
from orthoshard.lab.compare.settings import ManyRuns
from orthoshard.lab.train.config import TrainConfig, share, to_dict
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.presets import load_preset
from orthoshard.lab.train.torchrun import started_by_torchrun
from orthoshard.lab.verb import WIDTH, exit_code


@dataclass(frozen=True)
class Command(ManyRuns):
    """Search learning rates, rank fraction, momentum and weight decay of the training run of `orthoshard train`.

    Every trial is a separate run. The first trials are the defaults of the optimizers. A trial that is worse than the
    median of earlier ones at a validation is stopped. You can stop the search at any moment: the same command
    continues, and a larger --trials adds more. The heat map and all numbers are in --out: heatmap.png,
    results.json. The best settings are printed as flags for `orthoshard train`.

    examples:
      orthoshard compare --search --trials 30
      orthoshard compare --search --optimizers dion dion_tail muon --trials 60 --jobs 2
      orthoshard compare --search --lr 0.005 0.05 --rank-fraction 1/64 1/4 --momentum 0.95 --weight-decay 0.01
    """

    out: Path = Path("runs/search")
    """The folder of the search: a new one, or one to continue."""
    trials: int = 24
    """The total number of runs, including those already there."""
    optimizers: tuple[str, ...] = ("dion",)
    """One or several of `dion`, `dion_tail`, `muon` and `adamw`; if several, the optimizer is searched too."""
    lr: tuple[float, ...] = ()
    """Lowest and highest peak learning rate of matrices, or one value; by default an eighth to eight times the default
    of each optimizer."""
    scalar_lr: tuple[float, ...] = spaces.SCALAR_RATES
    """The same for embeddings, heads, norms and biases."""
    rank_fraction: tuple[str, ...] = ("1/16", "1")
    """Lowest and highest, searched by powers of two, or one value."""
    momentum: tuple[float, ...] = spaces.MOMENTUM
    """Lowest and highest, or one value."""
    weight_decay: tuple[float, ...] = spaces.WEIGHT_DECAY
    """Lowest and highest, or one value."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How trials are drawn: from earlier results (tree-structured Parzen estimator), or at random."""
    no_prune: bool = False
    """Run every trial to its end."""
    seed: int = 0
    """Seed of the trials and of every run."""
    report_only: bool = False
    """Run nothing; make the heat map, table and JSON again from the runs in --out, with the same flags."""


def main(arguments: Sequence[str], start: Start = start_process) -> int:
    """Run a search. ``arguments`` come without ``--search``."""

    def work() -> int:
        return _main(settings.parse(Command, "orthoshard compare --search", arguments), start)

    return exit_code("compare", work, resumes=True)


def _main(command: Command, start: Start) -> int:
    if started_by_torchrun():
        raise UserError("a search runs in one process; run it without torchrun.")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    ranges = (command.lr, _fractions(command), command.momentum, command.weight_decay, command.scalar_lr)
    space = Space(command.optimizers, *ranges)
    base = command.base(command.seed)
    if command.trials < 1:
        raise UserError(f"--trials is {command.trials}; give a whole number of at least 1.")
    base.check()
    space.check()
    if command.report_only:
        digest = str(Folder(command.out).read(_fixed)["digest"])
    else:
        digest = settings.try_out(base, {name: space.default(name) for name in space.optimizers})
    with Folder(command.out).claimed(_settings(command, base, space, digest), _fixed) as keep_open:
        prune = not command.no_prune
        search = Search(command.out, base, space, command.trials, command.seed, command.sampler, prune, digest)
        broken = [] if command.report_only else _run(console, search, command.jobs, start, keep_open)
        _show(console, command, search)
    return tell(broken)


def _run(console: Console, search: Search, parallel: int, start: Start, keep_open: Sequence[int]) -> list[str]:
    def counts() -> tuple[int, int]:
        return search.done(), max(search.trials, search.drawn())

    with display(console, counts, Clock(parallel)) as shown:
        runs, listener = search.folder / RUNS, Pruning(search, shown)
        return run_all(lambda: search.wanted(parallel), runs, parallel, listener, start=start, keep_open=keep_open)


def _show(console: Console, command: Command, search: Search) -> None:
    """Write the files; print the table, and the command for the best trial."""
    found, out = search.found(), command.out
    if not found:
        raise UserError(f"there is no trial in {out} yet; start without --report-only.")
    best = found[0] if found[0].status == "finished" else None
    again = None
    if best:
        config = dataclasses.replace(search.base, optimizer=best.optimizer)
        again = flags(config, load_preset(command.preset), command.preset)
    about = {"report": environment.describe(), **_settings(command, search.base, search.space, search.digest)}
    about |= {"rivals": [{"label": each.label, "config": to_dict(each.optimizer)} for each in found]}
    about |= {"sweep": {"seeds": [search.seed]}, "reference": None}
    runs = {each.label: search.outcome(each) for each in found}
    rows = [row_of(each, runs[each.label]) for each in found]
    Folder(out).write_results(about, rows, [run for run in runs.values() if run is not None], {"best": again})
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


def _fractions(command: Command) -> tuple[float, ...]:
    try:
        return tuple(share(text) for text in command.rank_fraction)
    except ValueError:
        given = " ".join(command.rank_fraction)
        raise UserError(f"--rank-fraction {given}: give shares above 0, at most 1, such as 1/64 1/4.") from None


def _settings(command: Command, base: TrainConfig, space: Space, digest: str) -> dict[str, Any]:
    made = {"base": comparable(base), "space": dataclasses.asdict(space), "seed": command.seed, "digest": digest}
    return json.loads(json.dumps(made))  # as it will be read


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may not change: more trials, another sampler or pruning continue a search, but another
    space, model or text does not."""
    return {key: settings[key] for key in ("base", "space", "seed", "digest")}
