"""Five optimizers tuned side by side at width 256, by one declared protocol, on one GPU lent for minutes.

    python experiments/tuned/wide.py run --jobs 15 --seconds 300 [--out results.jsonl]
    python experiments/tuned/wide.py table [results.jsonl ...]        what has been run: the tables of docs/evidence.md

The protocol, which was committed before the first run:

run     `orthoshard train --model small` (Llama, width 256, 4 layers): Shakespeare, 1,500 steps of 16 x 128 tokens,
        warm-up 20, then linear to 0, float32. Its figure is the least validation loss of a run, nats a token, validated
        every 100 steps. A run that diverged or failed counts as infinity.
start   the best pair of rates of the committed comparison at width 128 (benchmarks/results/
        compare-shakespeare-width-128); all else as tuned at width 64 by run.py beside this file.
tune    on seed 0, all optimizers at once: the start, and every neighbour of the best so far: lr x 2, lr / 2,
        scalar_lr x 2, scalar_lr / 2, momentum the other of 0.9 and 0.95 (AdamW: beta1 the other of 0.8 and 0.9). The
        search moves as soon as a run is better, so the order in which runs end may choose its way. Where no neighbour
        is better, lr x sqrt 2 and lr / sqrt 2 are tried, whose own finer neighbours have been run by then; the best of
        all is the end. The optimizer with the fewest runs goes first.
report  seeds 1 and 2 at the end. Where time ends the search, the best so far takes its place and is "still moving":
        seeds start while they can still end.
larger  `--model medium` (width 512, 8 layers), seed 0, at the settings of width 256: Muon, DionTail 1/4, and AdamW at
        its lr and half of it. They too start while they can still end, with the best so far.
stages  with what time is left: `equilibrate rows`, momentum in 8 bits, `row_moment` and `nanochat` of run.py on
        DionTail 1/4 and Muon at their settings, lr unchanged, seeds 0, 1, 2. A difference is claimed where all three
        seeds have its sign.

Runs in --out or in wide.jsonl are not run again. All workers share one GPU, so no time of a step is one of a GPU alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from run import DEFAULTS, SEEDS, STAGES, Settings, configured, least

from orthoshard.lab.train.loop import train

RESULTS = Path(__file__).parent / "wide.jsonl"
Task = dict[str, Any]  # label, settings, seed, model, steps, stage, moving; a record is a task with what came of it

ADAMW: Settings = {"name": "adamw", "lr": 0.0015, "scalar_lr": 0.192, "beta1": 0.8}
MUON: Settings = {"name": "muon", "lr": 0.02, "scalar_lr": 0.048, "momentum": 0.9, "weight_decay": 0.0}
TAIL: Settings = {"name": "dion_tail", "rank_fraction": 0.25, "lr": 0.02, "scalar_lr": 0.048, "momentum": 0.9}
THIN: Settings = {"name": "dion_tail", "rank_fraction": 0.0625, "lr": 0.01, "scalar_lr": 0.192, "weight_decay": 0.0}
DION: Settings = {"name": "dion", "rank_fraction": 0.25, "lr": 0.02, "scalar_lr": 0.192, "momentum": 0.9}
START: dict[str, Settings] = {
    "adamw": {**DEFAULTS, **ADAMW},
    "muon": {**DEFAULTS, **MUON},
    "tail-1/4": {**DEFAULTS, **TAIL, "weight_decay": 0.03, "beta2": 0.95},
    "tail-1/16": {**DEFAULTS, **THIN},
    "dion-1/4": {**DEFAULTS, **DION, "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.95},
}
LARGER = (("muon", 1.0), ("tail-1/4", 1.0), ("adamw", 1.0), ("adamw", 0.5))  # and the share of lr
STAGED = [
    (stage, label) for stage in ("equilibrate rows", "int8", "row_moment", "nanochat") for label in ("tail-1/4", "muon")
]
RESERVE = 1.15  # of the longest run so far, kept for what has to end


def key(task: Task) -> str:
    return json.dumps([task["settings"], task["seed"], task["model"], task["steps"]], sort_keys=True)


def neighbours(label: str, at: Settings) -> list[Settings]:
    name, values = ("beta1", (0.8, 0.9)) if label == "adamw" else ("momentum", (0.9, 0.95))
    steps = [{rate: at[rate] * by} for rate in ("lr", "scalar_lr") for by in (2, 0.5)]
    return [{**at, **step} for step in (*steps, {name: values[at[name] == values[0]]})]


class Plan:
    """What has been run or is running, and what comes next. It knows no clock: ``next`` is told the time."""

    def __init__(self, given: argparse.Namespace, found: list[Task]) -> None:
        self.given = given
        self.runs: dict[str, Task] = {key(one): one for one in found}
        self.longest: dict[str, float] = {}
        self.fixed: dict[tuple[str, str], Settings] = {}  # what seeds and larger runs were begun with

    def task(self, label: str, settings: Settings, seed: int = 0, **more: Any) -> Task:
        one = {"label": label, "settings": settings, "seed": seed, "model": self.given.model, "steps": self.given.steps}
        return {**one, "stage": None, **more}

    def loss(self, task: Task) -> float | None:
        """Return the figure of this run; None if there is none yet."""
        one = self.runs.get(key(task), {})
        return None if "seconds" not in one else math.inf if one["loss"] is None else one["loss"]

    def finish(self, one: Task) -> None:
        self.runs[key(one)] = one
        if "error" not in one:
            self.longest[one["model"]] = max(self.longest.get(one["model"], 0.0), one["seconds"])

    def estimate(self, model: str) -> float:
        return self.longest.get(model, self.given.guess[model != self.given.model])

    def searched(self, label: str) -> list[Task]:
        """Return all runs of a search, running ones too."""
        alike = self.task(label, {})
        same = ("label", "seed", "model", "steps")
        return [one for one in self.runs.values() if all(one[name] == alike[name] for name in same)]

    def search(self, label: str) -> tuple[Settings, list[Task], bool]:
        """Return the best so far, the runs that a search wants now, and whether it has ended."""
        known = [(loss, one["settings"]) for one in self.searched(label) if (loss := self.loss(one)) is not None]
        coarse = [pair for pair in known if math.log2(pair[1]["lr"] / START[label]["lr"]) % 1 == 0]
        at = min(coarse, key=lambda pair: pair[0], default=(math.inf, START[label]))[1]
        best = min(known, key=lambda pair: pair[0], default=(math.inf, at))[1]
        finer = [{**at, "lr": at["lr"] * by} for by in (math.sqrt(2), math.sqrt(0.5))]
        for ring in ([START[label], *neighbours(label, at)], finer):
            missing = [task for task in (self.task(label, one) for one in ring) if self.loss(task) is None]
            if missing:
                return best, [task for task in missing if key(task) not in self.runs], False
        return best, [], True

    def next(self, now: float) -> Task | None:
        """Return what a free worker starts now; None if nothing can end in time."""
        given = self.given
        found = {label: self.search(label) for label in START}

        def begun(kind: str, label: str) -> tuple[Settings, dict[str, Any]]:
            best, _, ended = found[label]
            return self.fixed.get((kind, label), best), {"moving": not ended}

        seeds, larger, stages = [], [], []
        for label in START:
            settings, moving = begun("seeds", label)
            seeds += [self.task(label, settings, seed, **moving) for seed in SEEDS[1:]]
        for label, share in LARGER:
            settings, moving = begun("larger", label)
            larger.append(self.task(label, {**settings, "lr": settings["lr"] * share}, model=given.larger, **moving))
        for stage, label in STAGED:
            settings, moving = begun("seeds", label)
            name, staged = f"{label}, {stage}", {**settings, **STAGES[stage]}
            stages += [self.task(name, staged, seed, stage=stage, **moving) for seed in SEEDS]

        settled = {label for label in START if found[label][2] or ("seeds", label) in self.fixed}

        def left(tasks: list[Task]) -> list[Task]:
            return [task for task in tasks if key(task) not in self.runs]

        def early(tasks: list[Task]) -> list[Task]:
            return [task for task in left(tasks) if task["label"].split(", ")[0] in settled]

        def due(tasks: list[Task], jobs: int) -> list[Task]:
            """Return those of the runs for which a worker that starts something else now could be back too late."""
            rest = left(tasks)
            rounds = math.ceil(len(rest) / max(1, jobs))
            latest = given.seconds - RESERVE * rounds * self.estimate(tasks[0]["model"])
            return rest if now + self.estimate(given.model) > latest else []

        wanted = sorted(START, key=lambda label: len(self.searched(label)))
        kinds = [
            ("larger", due(larger, given.jobs)),
            ("seeds", due(seeds, given.jobs - len(larger))),
            ("search", [task for label in wanted for task in found[label][1]]),
            ("seeds", early(seeds)),
            ("larger", early(larger)),
            ("stages", early(stages)),
        ]
        for kind, tasks in kinds:
            for task in tasks:
                if now + self.estimate(task["model"]) <= given.seconds:
                    self.runs[key(task)] = task
                    if kind in ("seeds", "larger"):
                        self.fixed.setdefault((kind, task["label"]), begun(kind, task["label"])[0])
                    return task
        return None


def measured(task: Task, folder: Path, given: argparse.Namespace) -> Task:
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            how = {name: task[name] for name in ("seed", "model", "steps")} | {"validate_every": given.validate_every}
            config = configured(task["settings"], device=given.device, precision="float32", **how)
            result = train(config, Path(inside) / "run")
        came: Task = {
            "loss": least(result.events),
            "ms": 1000 * result.seconds / result.step,
            "optimizer_ms": 1000 * result.optimizer_seconds / result.step,
            "device": result.events[0]["machine"]["name"],
            "torch": result.events[0]["versions"]["torch"],
        }
    except Exception as error:
        came = {"loss": None, "error": repr(error)}
    return {**task, **came, "seconds": time.perf_counter() - started}


def work(pipe: Connection, folder: Path, given: argparse.Namespace) -> None:
    os.dup2(2, 1)  # what libraries say goes to stderr; stdout is the parent's, a line a run
    warm = {"settings": START["tail-1/4"], "seed": 0, "model": given.model, "steps": 1}
    measured(warm, folder, given)  # what a process does once would make its first run look long
    while True:
        pipe.send(measured(pipe.recv(), folder, given))


def run(given: argparse.Namespace, began: float) -> Plan:
    plan = Plan(given, read([RESULTS, given.out]))
    context = multiprocessing.get_context("spawn")
    busy: dict[Any, Task | None] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder, given.out.open("a") as out:
        for _ in range(given.jobs):
            mine, its = context.Pipe()
            processes.append(context.Process(target=work, args=(its, Path(folder), given), daemon=True))
            processes[-1].start()
            its.close()
            busy[mine] = None
        while busy and (now := time.monotonic() - began) < given.seconds:
            for pipe in [pipe for pipe, task in busy.items() if task is None]:
                if (task := plan.next(now)) is not None:
                    pipe.send(task)
                    busy[pipe] = task
            if not any(busy.values()):
                break
            for pipe in wait([pipe for pipe, task in busy.items() if task], min(1.0, given.seconds - now)):
                try:
                    one, busy[pipe] = pipe.recv(), None
                except (EOFError, OSError) as error:  # the process has died: the others go on
                    one = {**(busy.pop(pipe) or {}), "loss": None, "error": repr(error), "seconds": 0.0}
                plan.finish(one)
                out.write(json.dumps(one) + "\n")
                out.flush()
                where = f"{one['model']} {one['label']} seed {one['seed']} {shown(one['settings'])}"
                print(f"{time.monotonic() - began:5.0f} s  {where}: {one['loss']} {one.get('error', '')}", flush=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(3)
            process.kill()
    return plan


def read(paths: list[Path]) -> list[Task]:
    return [json.loads(line) for path in paths if path.is_file() for line in path.read_text().splitlines()]


def shown(at: Settings) -> str:
    return f"{at['lr']:.3g}, {at['scalar_lr']:.3g}, {at['beta1' if at['name'] == 'adamw' else 'momentum']}"


def table(plan: Plan) -> None:
    ended = [one for one in plan.runs.values() if plan.loss(one) is not None]

    def seeds(one: Task) -> list[float]:
        found = [plan.loss({**one, "seed": seed}) for seed in SEEDS]
        return [loss for loss in found if loss is not None]

    def figures(losses: list[float]) -> str:
        half = (max(losses) - min(losses)) / 2
        mean = f"{sum(losses) / 3:.3f} ± {half:.3f}" if len(losses) == 3 else ""
        return f"{', '.join(f'{loss:.3f}' for loss in losses)} | {mean}"

    def less(label: str) -> str:
        pairs = zip(shown_seeds[label], shown_seeds.get("muon", []), strict=False)
        return "" if label == "muon" else ", ".join(f"{loss - muon:+.3f}" for loss, muon in pairs)

    titles = ("optimizer", "lr", "scalar lr", "momentum", "beta1", "seeds 0, 1, 2", "mean ± half the range", "search")
    print(f"| {' | '.join((*titles, 'minus Muon'))} |")
    print("|---" * 9 + "|")
    shown_seeds: dict[str, list[float]] = {}
    for label in sorted(START, key="muon".__ne__):
        runs = [one for one in plan.searched(label) if plan.loss(one) is not None]
        if runs:  # the best of those with most seeds
            one = min(runs, key=lambda one: (-len(seeds(one)), plan.loss(one)))
            best, wanted, ended = plan.search(label)
            coarse = sum(abs(math.log2(task["settings"]["lr"] / START[label]["lr"]) % 1) < 0.1 for task in wanted)
            left = "ended" if ended else f"{coarse} neighbours left" if coarse else "finer rates left"
            at, search = one["settings"], left if best == one["settings"] else "a better one on seed 0"
            momentum = "" if label == "adamw" else at["momentum"]
            rates = f"{at['lr']:.3g} | {at['scalar_lr']:.3g} | {momentum} | {at['beta1']}"
            shown_seeds[label] = seeds(one)
            print(f"| {label} | {rates} | {figures(seeds(one))} | {search} | {less(label)} |")
    print("\nSeed 0: lr, scalar lr, momentum (AdamW: beta1) -> loss")
    for label in START:
        runs = sorted(plan.searched(label), key=lambda one: shown(one["settings"]))
        found = [f"{shown(one['settings'])} -> {plan.loss(one):.3f}" for one in runs if plan.loss(one) is not None]
        print(f"{label} ({len(found)}): {'; '.join(found)}")
    print("\nStages: lr, scalar lr, momentum: seeds | mean ± half the range")
    for one in {json.dumps(one["settings"]): one for one in ended if one["stage"]}.values():
        print(f"{one['label']}, {shown(one['settings'])}: {figures(seeds(one))}")
    print("\nLarger: lr, scalar lr, momentum (AdamW: beta1) -> loss, ms a step, of these in the optimizer")
    for one in ended:
        if one["model"] != plan.given.model:
            times = f"{one['ms']:.1f} ms, {one['optimizer_ms']:.1f} ms" if "ms" in one else one["error"]
            print(f"{one['model']} {one['label']}: {shown(one['settings'])} -> {plan.loss(one):.3f}, {times}")


def main() -> None:
    began = time.monotonic()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("run", "table"))
    options.add_argument("files", nargs="*", type=Path, default=[RESULTS])
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--guess", type=float, nargs=2, default=(60.0, 109.0), help="seconds of a run of either model")
    defaults = {"jobs": 15, "seconds": 300.0, "model": "small", "larger": "medium", "steps": 1500, "device": "cuda"}
    for name, default in {**defaults, "validate-every": 100}.items():
        options.add_argument(f"--{name}", type=type(default), default=default)
    given = options.parse_args()
    table(run(given, began) if given.what == "run" else Plan(given, read(given.files)))


if __name__ == "__main__":
    main()
