"""``orthoshard bench``: selects the mode by the flags, shows progress, and writes a file at the end.

May import tyro, rich, torch and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from orthoshard.lab.bench import breakdown, compare, owners, replicas, sharded, slow_link_plot
from orthoshard.lab.bench.checks import check_memory, check_modes, check_processes, find_device, need_matplotlib
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import (
    NARROW,
    TORCH,
    TRITON,
    Contestant,
    all_contestants,
    choose,
    matching,
    parse_rank,
    rules_alone,
)
from orthoshard.lab.bench.measure import about, measure
from orthoshard.lab.bench.models import MODELS, ModelShapes, find_model
from orthoshard.lab.bench.selftest.run import run_self_test
from orthoshard.lab.bench.session import DISTURBED, carry_out, plan_of, watched, with_load
from orthoshard.lab.bench.slow_link import MOST, check
from orthoshard.lab.bench.tables import link_table, owners_table, sharded_table, steps_table
from orthoshard.lab.train.optimizers import import_plugin
from orthoshard.lab.verb import WIDTH, exit_code, read_flags

RESULTS = Path("runs/bench")
RANKS, REPLICAS_RANKS = ("1", "1/4", "1/16"), ("1/16",)
# What is timed if no flag says otherwise; on a GPU a model that keeps it busy, at ranks that fit 80 GB together.
ON_A_CPU, ON_A_GPU = ("gpt2-small", "float32"), ("llama-3.2-1b", "bfloat16")
GPU_RANKS, FEWER_GPU_RANKS = ("1/4", "1/16"), ("1/16",)


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(BenchConfig, "orthoshard bench", argv)
    return exit_code("bench", lambda: run(config))


def run(config: BenchConfig) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    beside = [*NARROW.get(config.state_dtype or "", ())]
    beside += [form for form in (TORCH, TRITON) if config.kernels == form.kernels]
    for forms in (*NARROW.values(), (TORCH,), (TRITON,)):
        if forms[0] not in beside and any(forms[0].tag in pattern for pattern in config.only):
            beside += forms
    if config.plugin:
        import_plugin(config.plugin)
    if config.list:
        contestants = all_contestants(config.ranks or RANKS, beside)
        for model in MODELS.values():
            console.print(f"{model.name:14} {model.elements / 1e6:8.1f} M   {model.source}", highlight=False)
        console.print("\n" + "  ".join(contestant.name for contestant in contestants), highlight=False)
        return 0
    check_modes(config)
    if config.self_test:
        return run_self_test(config, RESULTS)
    if len(config.compare) == 2:
        return run_comparison(config, console)
    config = settled(config, len(beside))
    shapes = find_model(config.model).first(config.layers)
    if config.replicas:
        return run_replicas(config, shapes, console)
    if config.owners:
        return run_owners(config, shapes, console)
    if config.processes:
        return run_sharded(config, shapes, console)
    contestants = all_contestants(config.ranks, beside)
    if config.stages:
        return run_stages(config, shapes, choose(rules_alone(contestants), config.only), console)
    return run_steps(config, shapes, choose(contestants, config.only), console)


def settled(config: BenchConfig, forms: int = 0) -> BenchConfig:
    """Choose what the flags leave to the kind of device. ``forms``: how many are timed beside the plain one."""
    several = config.replicas or config.owners or config.processes  # which are of the CPU
    gpu = not several and find_device(config.device).type == "cuda"
    model, dtype = ON_A_GPU if gpu else ON_A_CPU
    ranks = REPLICAS_RANKS if config.replicas else RANKS
    if gpu and not config.only:
        ranks = FEWER_GPU_RANKS if forms else GPU_RANKS
    return replace(
        config,
        model=model if config.model == "auto" else config.model,
        dtype=dtype if config.dtype == "auto" else config.dtype,
        ranks=config.ranks or ranks,
    )


def run_steps(config: BenchConfig, shapes: ModelShapes, chosen: list[Contestant], console: Console) -> int:
    old = compare.read_result(config.compare[0]) if config.compare else None
    plan = plan_of(config, shapes, chosen)
    if old:
        compare.check_fit(old, about(plan, None), str(config.compare[0]), "what these flags ask for")
    out = config.out or RESULTS / f"{shapes.name}-{plan.device.type}-{config.dtype}.json"

    def said(result: dict[str, Any]) -> Iterator[str]:
        for name, seconds in result["left_out"].items():
            yield f"{name} is left out: its first steps took {seconds:.0f} s, more than --limit {config.limit:g}."
        if any(row["max_ms"] > DISTURBED * row["min_ms"] for row in result["contestants"].values()):
            yield "Some steps took far longer than others: the machine was busy. The file has ratios of minima."

    result = carry_out(console, out, partial(watched, console, partial(measure, plan)), steps_table, said)
    if old:
        show_comparison(console, old, result, f"{config.compare[0]}, then this run")
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

    def said(result: dict[str, Any]) -> Iterator[str]:
        for name, row in result["contestants"].items():
            if not breakdown.agrees(row):
                yield (
                    f"The stages of {name} add up to {row['sum_over_step']:.0%} of its step. Below 100%: the matrices "
                    f"are small, and time passes between operations. Above 100%: the machine was busy."
                )

    work = partial(watched, console, partial(breakdown.measure_stages, plan))
    carry_out(console, out, work, breakdown.table, said)
    return 0


def run_sharded(config: BenchConfig, shapes: ModelShapes, console: Console) -> int:
    check_processes(config, "processes")
    threads = config.threads or torch.get_num_threads()
    setting = sharded.Setting(config.processes, shapes, rivals(config), config.rounds or 5, config.seed, threads)
    out = config.out or RESULTS / f"{shapes.name}-{config.processes}-processes.json"
    about = {"processes": config.processes, "threads": threads}
    carry_out(console, out, partial(with_load, shapes, about, partial(sharded.measure, setting)), sharded_table)
    return 0


def run_owners(config: BenchConfig, shapes: ModelShapes, console: Console) -> int:
    check_processes(config, "owners")
    setting = sharded.Setting(config.owners, shapes, rivals(config), config.rounds or 5, config.seed)
    who = f"{config.owners} replicas of {shapes.name}"
    check_memory(who, owners.memory_needed(setting), sharded.CPU, "take fewer --layers")
    out = config.out or RESULTS / f"{shapes.name}-{config.owners}-owners.json"
    about = {"replicas": config.owners, "threads": 1}
    carry_out(console, out, partial(with_load, shapes, about, partial(owners.measure, setting)), owners_table)
    return 0


def rivals(config: BenchConfig) -> sharded.Rivals:
    """Return those of Dion at each rank and Muon that ``--only`` names."""
    fractions = [parse_rank(rank) for rank in config.ranks]
    known: dict[str, dict[str, Any]] = {f"dion-{f}": {"rule": "dion", "rank_fraction": float(f)} for f in fractions}
    known["muon"] = {"rule": "muon"}
    return tuple((name, known[name]) for name in matching(list(known), config.only))


def run_replicas(config: BenchConfig, shapes: ModelShapes, console: Console) -> int:
    setting = replicas_setting(config, shapes)
    check()
    who = f"{setting.replicas} replicas of {shapes.name}"
    check_memory(who, replicas.memory_needed(setting), sharded.CPU, "take fewer --replicas or --ranks")
    out = config.out or RESULTS / f"{shapes.name}-slow-link.json"
    about = {
        "replicas": setting.replicas,
        "bandwidths_mbit": setting.bandwidths,
        "matrices": shapes.matrices,
        "threads": setting.threads,
    }

    work = partial(with_load, shapes, about, lambda: beside_gradients(replicas.measure(setting)))
    carry_out(console, out, work, link_table, plot=slow_link_plot.plot)
    return 0


def beside_gradients(found: dict[str, Any]) -> dict[str, Any]:
    """Return the rows, those of factors with their gain over gradients of the same rank."""
    pairs = {name: f"gradients {name.removeprefix('factors ')}" for name in found if name.startswith("factors")}
    for name, other in pairs.items():
        for point, gradients in zip(found[name]["points"], found[other]["points"], strict=True):
            point["gain"] = gradients["measured_ms"] / point["measured_ms"]
    return {name: {"against": pairs.get(name), **row} for name, row in found.items()}


def replicas_setting(config: BenchConfig, shapes: ModelShapes) -> replicas.Setting:
    """Check the flags of ``--replicas`` and return the setting that they ask for. Raises ValueError."""
    check_processes(config, "replicas", MOST)
    if config.only:
        raise ValueError("--only does not go with --replicas, which chooses what to time by itself: leave it out.")
    wrong = [mbit for mbit in config.bandwidths if not 0.1 <= mbit <= 1e5]
    if wrong or not config.bandwidths:
        raise ValueError(f"--bandwidths {wrong[0] if wrong else ''}: give Mbit/s from 0.1 to 100000, such as 100 1000.")
    need_matplotlib()
    fractions = list(dict.fromkeys(parse_rank(rank) for rank in config.ranks))
    rivals = tuple(
        (f"{sync} {fraction}", {"rule": "dion", "rank_fraction": float(fraction), "replica_sync": sync})
        for fraction in fractions
        for sync in ("gradients", "factors")
    )
    bandwidths = tuple(sorted(set(config.bandwidths)))
    seconds, threads = config.seconds / len(bandwidths), config.threads or 1
    return replicas.Setting(config.replicas, shapes, rivals, config.rounds, config.seed, threads, bandwidths, seconds)
