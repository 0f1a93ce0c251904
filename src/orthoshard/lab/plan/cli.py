"""``orthoshard plan``: the cost of each optimizer for a model, a mesh and a machine, over a whole run.

May import tyro, rich, torch and ``orthoshard``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from orthoshard.lab.bench.contestants import parse_rank
from orthoshard.lab.bench.environment import cores, describe, load
from orthoshard.lab.bench.files import claim, write_json
from orthoshard.lab.bench.models import find_model
from orthoshard.lab.explain.mesh import read_mesh
from orthoshard.lab.plan import hardware, measure
from orthoshard.lab.plan.check import BAND, check
from orthoshard.lab.plan.estimate import Job
from orthoshard.lab.plan.make import DTYPES, Planned, check_mesh, make
from orthoshard.lab.plan.recommend import Advice, assumptions, recommend
from orthoshard.lab.plan.sheet import check_table, show
from orthoshard.lab.plan.subject import subject
from orthoshard.lab.train.config import SHARE
from orthoshard.lab.train.optimizers import import_plugin
from orthoshard.lab.verb import exit_code, read_flags

WIDTH = 150  # if the output is not a terminal
SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
PROCESSES = (1, 2, 4)  # of a check


@dataclass(frozen=True)
class PlanConfig:
    """Compare the cost of AdamW, Muon, Dion and DionTail for a model, a mesh and a machine: memory, time and money.

    Nothing is downloaded, and no memory is taken for weights. docs/plan.md has the formulas for all figures."""

    model: str = "llama3-8b"
    """A published model (`orthoshard explain --list` shows the names), a size of `orthoshard train`, or the path of a
    Hugging Face `config.json` or of a folder with one."""
    mesh: str = "dp=4,fsdp=8"
    """Axes and their sizes, such as `dp=16,fsdp=64,tp=8`: `dp` replicas, `fsdp` shards, `ep` expert parallelism, `tp`
    tensor parallelism. Ranks along the last axis are neighbours on a node."""
    hardware: str = "h100"
    """`a100`, `h100`, `h200`, `b200` or `cpu`; `measure` to measure the CPUs of this machine, with a process for each
    rank; or a TOML file with the same keys, as `machines.toml` or `machines.toml:name`."""
    tokens_per_step: str = "4M"
    """Tokens per step, on the whole mesh. k, M, B and T stand for 10^3, 10^6, 10^9 and 10^12."""
    tokens: str = "15T"
    """Tokens of the whole run."""
    utilization: Annotated[float, SHARE] = 0.4
    """Share of the datasheet's FLOP/s that forward and backward reach."""
    price: float = 0.0
    """Price of a rank (a GPU) per hour, in any currency; 0: no cost is shown."""
    budget: Annotated[float, SHARE] = 0.05
    """Largest acceptable overhead of the optimizer, as a share of forward and backward."""
    ranks: tuple[str, ...] = ("1", "1/4", "1/16", "1/64")
    """Rank fractions of Dion and DionTail."""
    plugin: str | None = None
    """A Python module to import first. The rules that it registers get rows too, but are not recommended."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and gradients."""
    per_node: int | None = None
    """Ranks per node, instead of the number in the hardware's description."""
    threads: int = 1
    """CPU threads of each process, with `--hardware measure`."""
    json: Path | None = None
    """A JSON file to write all figures to."""
    check: bool = False
    """Instead of a plan, compare predicted with measured steps on this machine, for 1, 2 and 4 processes. See
    `--check-model`, `--layers`, `--rounds` and `--threads` (used with one process)."""
    check_model: str = "gpt2-small"
    """With `--check`: the model, one of `orthoshard bench --list`."""
    layers: int = 2
    """With `--check`: number of layers of the model."""
    rounds: int = 5
    """With `--check`: number of steps for the median."""
    list: bool = False
    """Instead of a plan, show the machines."""


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(PlanConfig, "orthoshard plan", argv)
    return exit_code("plan", lambda: run(config))


def run(config: PlanConfig) -> int:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if config.list:
        for name, table in hardware.catalogue().items():
            console.print(f"{name:6}{table['about']}. {table['source']}", highlight=False, markup=False)
        return 0
    if config.json:
        claim(config.json, "--json", [Path(config.model), Path(config.model, "config.json"), Path(config.hardware)])
    if config.check:
        return run_check(config, console)
    if config.plugin:
        import_plugin(config.plugin)
    progress = Progress(
        TextColumn("{task.description:40}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress as bar:
        task = bar.add_task(f"reading {config.model}", total=1.0)
        planned = plan(config, lambda name, share: bar.update(task, description=name, completed=share))
    advice, words = recommend(planned, config.budget), tuple(assumptions(planned))
    show(planned, advice, words, console)
    if config.json:
        write_json(config.json, as_json(planned, advice, words, config))
        console.print(f"\nAll figures: {config.json}", highlight=False, soft_wrap=True)
    return 0


def run_check(config: PlanConfig, console: Console) -> int:
    for flag, value in (("--layers", config.layers), ("--rounds", config.rounds), ("--threads", config.threads)):
        if value < 1:
            raise ValueError(f"{flag} is {value}; give a whole number of at least 1")
    shapes = find_model(config.check_model).first(config.layers)
    rows: list[dict[str, Any]] = []
    for row in check(shapes, PROCESSES, config.threads, config.rounds):
        if not any(row["processes"] == before["processes"] for before in rows):
            console.print(row["machine"] + _others(row["others"]), highlight=False)
        rows.append(row)
    console.print(check_table(shapes.name, rows))
    outside = sum(not row["within"] for row in rows)
    console.print(f"{len(rows) - outside} of {len(rows)} within {BAND:.0%}.", highlight=False)
    if config.json:
        about = {"model": shapes.name, "threads": config.threads, **describe(), "load_after": load()}
        write_json(config.json, {**about, "rows": rows})
        console.print(f"All figures: {config.json}", highlight=False, soft_wrap=True)
    return 0


def _others(share: float | None) -> str:
    return "" if share is None else f" Other processes took {share:.0%} of the processors."


def plan(config: PlanConfig, step: Any = lambda name, share: None) -> Planned:
    """Return the plan for the settings. Raises ValueError or ``UserError`` for a bad setting."""
    tokens, per_step = number("--tokens", config.tokens), number("--tokens-per-step", config.tokens_per_step)
    if per_step > tokens:
        raise ValueError(f"--tokens-per-step {config.tokens_per_step} is more than all --tokens {config.tokens}")
    if not 0 < config.utilization <= 1:
        raise ValueError(f"--utilization is {config.utilization}; give a share above 0, at most 1, such as 0.4")
    if not (math.isfinite(config.price) and config.price >= 0):
        raise ValueError(f"--price is {config.price}; give the price of a rank per hour, 0 or more, such as 2.5")
    if not (math.isfinite(config.budget) and config.budget > 0):
        raise ValueError(f"--budget is {config.budget}; give a share above 0, such as 0.05")
    if config.per_node is not None and config.per_node < 1:
        raise ValueError(f"--per-node is {config.per_node}; give the number of ranks per node, such as 8")
    if config.threads < 1:
        raise ValueError(f"--threads is {config.threads}; give a whole number of at least 1")
    ranks: list[Fraction] = sorted({parse_rank(rank) for rank in config.ranks}, reverse=True)
    sizes = read_mesh(config.mesh)
    world = prod(sizes.values())
    data = prod(size for axis, size in sizes.items() if axis != "tp")
    if per_step < data:
        raise ValueError(f"--tokens-per-step {config.tokens_per_step} gives some of {data} data ranks no token")
    machine = _machine(config, world)
    chosen = subject(config.model, DTYPES[config.dtype])
    check_mesh(sizes, chosen, machine.machine.per_node)
    job = Job(chosen.active, world, per_step, tokens, config.utilization, config.price)
    return make(chosen, sizes, machine, job, ranks, step)


def _machine(config: PlanConfig, world: int) -> hardware.Hardware:
    if config.hardware != "measure":
        return hardware.find(config.hardware, config.per_node)
    here = cores()
    if world > here:
        raise ValueError(
            f"--hardware measure starts a process for each of {world} ranks, and this machine has {here} cores: take "
            f"a mesh of at most {here} ranks, or give the rates of one rank in a TOML file"
        )
    return measure.measure(world, config.threads)


def number(flag: str, text: str) -> float:
    """Return the value of a text such as ``16M``, which is 16e6. Raises ValueError."""
    scale = SUFFIXES.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if text[-1:] in SUFFIXES else text) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{flag} is {text!r}; give a number above 0, such as 16M, 500k or 15T")
    return value


def as_json(planned: Planned, advice: Advice, words: Sequence[str], config: PlanConfig) -> dict[str, Any]:
    """Return all figures of the plan as plain values."""
    machine = planned.hardware
    return {
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "model": {
            "name": planned.subject.described.name,
            "source": planned.subject.described.source,
            "parameters": planned.subject.parameters,
            "active": planned.subject.active,
        },
        "mesh": planned.sizes,
        "links": planned.links,
        "hardware": {"name": machine.name, "about": machine.about, "source": machine.source, **asdict(machine.machine)},
        "job": asdict(planned.job),
        "rows": [line.plain(planned.links) for line in planned.lines],
        "recommended": advice.chosen.contestant.name,
        "advice": list(advice.words),
        "assumptions": list(words),
        "torch": str(torch.__version__),
    }
