"""The time of each stage of a step, and their sum compared with the whole step.

Every round runs each contestant's step once unwatched and once watched, so that both run under the same conditions. The
sum of the stages' medians should be within `WITHIN` of the step's median. If it is lower, time passes between
operations; if it is higher, the machine was disturbed. May import rich, torch and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from orthoshard.lab.bench import environment
from orthoshard.lab.bench.contestants import Workload
from orthoshard.lab.bench.measure import Plan, Progress, about, warm_up
from orthoshard.lab.bench.stages import STAGES, Watch, observe
from orthoshard.lab.bench.timing import Spread, clock, run_rounds
from orthoshard.lab.tables import sheet

# Share of the whole step. Measured with `--model llama-60m --layers 2`, in CPU time of one busy core: 96 to 103%. For
# matrices of width 32 more time passes between operations than in them.
WITHIN = 0.1
HEADINGS = {
    "orthonormalization": "ortho-\nnormal",
    "error feedback": "error\nfeedback",
    "the step, unwatched": "step,\nunwatched",
}


def measure_stages(plan: Plan, progress: Progress = lambda what, share: None) -> dict[str, Any]:
    """Run ``plan`` and return the contents of the file."""
    load_before = environment.load()
    work = Workload(plan.shapes, plan.device, plan.dtype, plan.spectrum, plan.seed)
    warm_up(plan.device, plan.dtype)
    seen: dict[str, list[Watch]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for k, contestant in enumerate(plan.contestants):
        progress(f"first step: {contestant.name}", k / len(plan.contestants))
        assert contestant.optimizer is not None, contestant.name
        step = contestant.optimizer(work.parameters()).step
        step()
        watched = seen[contestant.name] = []
        steps[contestant.name] = step
        steps[_watched(contestant.name)] = _watching(step, watched, plan)
        observe(step, plan.device)  # looking up a function's stage takes longer the first time
    spreads = run_rounds(
        steps,
        clock(plan.device),
        plan.rounds,
        plan.seconds,
        plan.seed,
        progress=lambda done, share: progress(f"round {done}", share),
    )
    rows = {name: row_of(spreads[name], spreads[_watched(name)], watched) for name, watched in seen.items()}
    return {**about(plan, load_before), "within": WITHIN, "contestants": rows}


def _watched(name: str) -> str:
    return f"{name}, watched"


def _watching(step: Callable[[], object], into: list[Watch], plan: Plan) -> Callable[[], object]:
    return lambda: into.append(observe(step, plan.device))


def row_of(step: Spread, watched: Spread, watches: list[Watch]) -> dict[str, Any]:
    """Return a contestant's entry in the file: for each stage all times, median, share of the step, product flops."""
    stages: dict[str, Any] = {}
    for stage in STAGES:
        times = Spread(tuple(watch.milliseconds.get(stage, 0.0) for watch in watches))
        flops = watches[-1].flops.get(stage, 0)
        stages[stage] = {
            "median_ms": times.median,
            "share": times.median / step.median,
            "operations": watches[-1].operations.get(stage, 0),
            "product_flops": flops,
            "gflops_per_second": flops / times.median / 1e6 if flops and times.median else None,
            "times_ms": list(times.times),
        }
    total = sum(stage["median_ms"] for stage in stages.values())
    return {
        "step_median_ms": step.median,
        "watched_median_ms": watched.median,
        "sum_ms": total,
        "sum_over_step": total / step.median,
        "stages": stages,
        "step_times_ms": list(step.times),
    }


def agrees(row: Mapping[str, Any]) -> bool:
    """Return whether the stages add up to the step, to within `WITHIN`."""
    return abs(row["sum_over_step"] - 1) <= WITHIN


def table(result: Mapping[str, Any]) -> Table:
    """Return a table with each contestant's milliseconds, share of the step and product GFLOP/s of every stage."""
    title = f"one optimizer step by stage, {result['model']['name']}, {result['dtype']}, {result['device']}"
    headings = (HEADINGS.get(heading, heading) for heading in (*STAGES, "sum", "the step, unwatched"))
    drawn = sheet(("", "", *headings), left=(0, 1), title=title)
    for name, row in result["contestants"].items():
        stages = [row["stages"][stage] for stage in STAGES]
        times = [f"{stage['median_ms']:.4g}" if stage["operations"] else "" for stage in stages]
        shares = [f"{100 * stage['share']:.1f}" if stage["operations"] else "" for stage in stages]
        rates = [f"{rate:.0f}" if (rate := stage["gflops_per_second"]) else "" for stage in stages]
        drawn.add_row(name, "ms", *times, f"{row['sum_ms']:.4g}", f"{row['step_median_ms']:.4g}")
        drawn.add_row("", "%", *shares, f"{100 * row['sum_over_step']:.1f}", "")
        drawn.add_row("", "GFLOP/s", *rates, "", "", end_section=True)
    return drawn
