"""``orthoshard bench``: which mode the flags ask for, the live display, the file at the end.

May import tyro, rich, torch and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from orthoshard.lab.bench import breakdown, compare, growth, growth_report, replicas, slow_link_report
from orthoshard.lab.bench.checks import check_memory, check_modes, check_numbers
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import (
    NARROW,
    TORCH,
    TRITON,
    Contestant,
    all_contestants,
    choose,
    parse_rank,
    rules_alone,
)
from orthoshard.lab.bench.environment import describe, load
from orthoshard.lab.bench.files import claim, write_json
from orthoshard.lab.bench.measure import about, measure
from orthoshard.lab.bench.models import MODELS, ModelShapes, find_model
from orthoshard.lab.bench.owners import run_owners
from orthoshard.lab.bench.report import table
from orthoshard.lab.bench.selftest.run import run_self_test
from orthoshard.lab.bench.session import DISTURBED, plan_of, watched
from orthoshard.lab.bench.sharded import Setting, measure_sharded
from orthoshard.lab.bench.slow_link import MOST, check
from orthoshard.lab.verb import WIDTH, exit_code, read_flags

RESULTS = Path("runs/bench")
RANKS, REPLICAS_RANKS = ("1", "1/4", "1/16"), ("1/16",)


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(BenchConfig, "orthoshard bench", argv)
    return exit_code("bench", lambda: run(config))


def run(config: BenchConfig) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    narrow = config.state_dtype == "bfloat16" or any("bf16" in pattern for pattern in config.only)
    kernels = [
        form for form in (TORCH, TRITON) if config.kernels == form.kernels or any(form.tag in p for p in config.only)
    ]
    beside = (*(NARROW if narrow else ()), *kernels)
    contestants = all_contestants(config.ranks or RANKS, beside)
    if config.list:
        for model in MODELS.values():
            console.print(f"{model.name:14} {model.elements / 1e6:8.1f} M   {model.source}", highlight=False)
        console.print("\n" + "  ".join(contestant.name for contestant in contestants), highlight=False)
        return 0
    check_modes(config)
    if config.self_test:
        return run_self_test(config, RESULTS)
    if len(config.compare) == 2:
        return run_comparison(config, console)
    shapes = find_model(config.model).first(config.layers)
    if config.replicas:
        return run_replicas(config, shapes, console)
    if config.owners:
        return run_owners(config, shapes, config.ranks or RANKS, RESULTS, console)
    if config.processes:
        check_numbers(config)
        choose(contestants, config.only)
        return run_sharded(config, shapes, console)
    if config.growth:
        return run_growth(config, shapes, console)
    if config.stages:
        return run_stages(config, shapes, choose(rules_alone(contestants), config.only), console)
    return run_steps(config, shapes, choose(contestants, config.only), console)


def run_steps(config: BenchConfig, shapes: ModelShapes, chosen: list[Contestant], console: Console) -> int:
    old = compare.read_result(config.compare[0]) if config.compare else None
    plan = plan_of(config, shapes, chosen)
    if old:
        compare.check_fit(old, about(plan, None), str(config.compare[0]), "what these flags ask for")
    out = config.out or RESULTS / f"{shapes.name}-{plan.device.type}-{config.dtype}.json"
    claim(out)
    result = watched(console, lambda progress: measure(plan, progress))
    write_json(out, result)
    console.print(table(result))
    for name, seconds in result["left_out"].items():
        console.print(f"{name} is left out: its first steps took {seconds:.0f} s, more than --limit {config.limit:g}.")
    if any(row["max_ms"] > DISTURBED * row["min_ms"] for row in result["contestants"].values()):
        console.print("Some steps took far longer than others: the machine was busy. The file has ratios of minima.")
    if old:
        show_comparison(console, old, result, f"{config.compare[0]}, then this run")
    console.print(f"All times: {out}", highlight=False, soft_wrap=True)
    return 0


def run_comparison(config: BenchConfig, console: Console) -> int:
    old, new = (compare.read_result(path) for path in config.compare)
    compare.check_fit(old, new, *map(str, config.compare))
    show_comparison(console, old, new, f"{config.compare[0]}, then {config.compare[1]}")
    return 0


def show_comparison(console: Console, old: dict[str, Any], new: dict[str, Any], title: str) -> None:
    console.print(compare.table(compare.rows_of(old, new), title))
    differences = compare.differences(old, new)
    if differences:
        console.print(differences, highlight=False, soft_wrap=True)


def run_stages(config: BenchConfig, shapes: ModelShapes, chosen: list[Contestant], console: Console) -> int:
    plan = plan_of(config, shapes, chosen)
    out = config.out or RESULTS / f"{shapes.name}-{plan.device.type}-{config.dtype}-stages.json"
    claim(out)
    result = watched(console, lambda progress: breakdown.measure_stages(plan, progress))
    write_json(out, result)
    console.print(breakdown.table(result))
    for name, row in result["contestants"].items():
        if not breakdown.agrees(row):
            console.print(
                f"The stages of {name} make up {row['sum_over_step']:.0%} of its step: where that is less, the "
                f"matrices are small and time passes between operations; where it is more, the machine was busy."
            )
    console.print(f"All times: {out}", highlight=False, soft_wrap=True)
    return 0


def run_sharded(config: BenchConfig, shapes: ModelShapes, console: Console) -> int:
    if config.processes < 2:
        raise ValueError(f"--processes is {config.processes}; give 2 or more, or leave it out.")
    out = config.out or RESULTS / f"{shapes.name}-{config.processes}-processes.json"
    claim(out)
    rivals = [
        (f"dion-{rank}", {"rule": "dion", "rank_fraction": float(parse_rank(rank))}) for rank in config.ranks or RANKS
    ]
    rivals = [row for row in [*rivals, ("muon", {"rule": "muon"})] if not config.only or row[0] in config.only]
    threads = config.threads or torch.get_num_threads()
    setting = Setting(config.processes, threads, tuple(shapes.matrices), tuple(rivals), config.rounds or 5, config.seed)
    rows = measure_sharded(setting)
    about = {"command": sys.argv, "model": shapes.name, "processes": config.processes, "threads": threads}
    write_json(out, {**about, **describe(), "contestants": rows})
    columns = ("", "one process", "collectives", "sharded", "ratio", "MB sent a rank")
    sheet = Table(*columns, title=f"one step of {shapes.name} over {config.processes} gloo processes, ms (medians)")
    for name, row in rows.items():
        milliseconds = [f"{row[f'{what}_ms']:.0f}" for what in ("one_process", "collectives", "sharded")]
        sheet.add_row(name, *milliseconds, f"{row['ratio']:.2f}", f"{row['bytes'] / 1e6:.1f}")
    console.print(sheet)
    console.print(f"All times: {out}", highlight=False, soft_wrap=True)
    return 0


def run_growth(config: BenchConfig, shapes: ModelShapes, console: Console) -> int:
    need_matplotlib()
    asked = growth.growth_of(config, shapes, config.ranks or RANKS)
    out = config.out or RESULTS / f"{shapes.name}-{asked.device.type}-{config.dtype}-{asked.rule}-{asked.along}.json"
    claim(out)
    picture = out.with_suffix(".png")
    claim(picture)
    result = watched(console, lambda progress: growth.measure_growth(asked, progress))
    write_json(out, result)
    growth_report.plot(result, picture)
    console.print(growth_report.table(result))
    console.print(growth_report.verdict(result))
    console.print(f"All times: {out}; the plot: {picture}", highlight=False, soft_wrap=True)
    return 0


def need_matplotlib() -> None:
    """Raises ValueError before anything is measured that could not be drawn."""
    if find_spec("matplotlib") is None:
        raise ValueError("The plot needs matplotlib: pip install 'orthoshard[lab]'.")


def run_replicas(config: BenchConfig, shapes: ModelShapes, console: Console) -> int:
    setting = replicas_setting(config, shapes)
    check()
    who = f"{setting.replicas} replicas of {shapes.name}"
    check_memory(who, replicas.memory_needed(setting), torch.device("cpu"), "take fewer --replicas or --ranks")
    out = config.out or RESULTS / f"{shapes.name}-slow-link.json"
    claim(out)
    picture = out.with_suffix(".png")
    claim(picture)
    about = {"model": shapes.name, "replicas": setting.replicas, "bandwidths_mbit": setting.bandwidths}
    about |= {"layers": shapes.layers, "matrices": setting.matrices}
    about |= {**describe(), "threads": setting.threads, "load_before": load()}
    rows = replicas.measure_replicas(setting)
    pairs = {name: f"gradients {name.removeprefix('factors ')}" for name in rows if name.startswith("factors")}
    rows = {name: {"against": pairs.get(name), **row} for name, row in rows.items()}
    result = {**about, "load_after": load(), "contestants": rows}
    write_json(out, result)
    slow_link_report.plot(result, picture)
    console.print(slow_link_report.table(result))
    console.print(f"All times: {out}; the plot: {picture}", highlight=False, soft_wrap=True)
    return 0


def replicas_setting(config: BenchConfig, shapes: ModelShapes) -> replicas.Setting:
    """What the flags ask for, checked."""
    check_numbers(config)
    if not 2 <= config.replicas <= MOST:
        raise ValueError(f"--replicas is {config.replicas}: give 2 to {MOST}, or leave it out.")
    others = {
        "--processes": config.processes,
        "--only": config.only,
        "--device": config.device not in ("auto", "cpu"),
        "--dtype": config.dtype != "float32",
        "--spectrum": config.spectrum != "flat",
    }
    for flag, given in others.items():
        if given:
            raise ValueError(f"{flag} does not go with --replicas, which times float32 steps on the CPU: leave it out.")
    wrong = [mbit for mbit in config.bandwidths if not 0.1 <= mbit <= 1e5]
    if wrong or not config.bandwidths:
        raise ValueError(f"--bandwidths {wrong[0] if wrong else ''}: give Mbit/s from 0.1 to 100000, such as 100 1000.")
    need_matplotlib()
    fractions = list(dict.fromkeys(parse_rank(rank) for rank in config.ranks or REPLICAS_RANKS))
    rivals = tuple(
        (f"{sync} {fraction}", {"rule": "dion", "rank_fraction": float(fraction), "replica_sync": sync})
        for fraction in fractions
        for sync in ("gradients", "factors")
    )
    bandwidths = tuple(sorted(set(config.bandwidths)))
    seconds = config.seconds / len(bandwidths)
    matrices, threads = tuple(shapes.matrices), config.threads or 1
    return replicas.Setting(config.replicas, threads, matrices, rivals, bandwidths, config.rounds, seconds, config.seed)
