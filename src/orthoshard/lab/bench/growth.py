"""Step time against the number of layers, the width or the rank: which points, and their times.

All points step in turn, as contestants do, and with them two measurements of the anchor, the point in the middle, from
which `predicted` takes its rates: its accumulation M += G alone, M read and written, G read; and the same optimizer on
as many matrices so small that nothing but the calls takes time. Flops and bytes are those of the library's own cost
model for the real plan, `budget.step_cost`. May import torch and the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from orthoshard import Dion, DionTail, Muon, RuleOptimizer
from orthoshard.budget import Cost, step_cost
from orthoshard.lab.bench import environment
from orthoshard.lab.bench.checks import check_memory, check_numbers, find_device
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import LR, Workload, all_contestants, choose, parse_rank, rules_alone
from orthoshard.lab.bench.measure import Progress, warm_up
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.predicted import Point, results
from orthoshard.lab.bench.session import settle
from orthoshard.lab.bench.timing import clock, run_rounds
from orthoshard.plan import build_plan

RULES: dict[str, type[RuleOptimizer]] = {"dion": Dion, "dion-tail": DionTail, "muon": Muon}
POINTS = {
    "layers": ("1", "2", "4", "8", "12", "24", "48"),
    "width": ("256", "384", "512", "768", "1024"),
    "rank": ("1/32", "1/16", "1/8", "1/4", "1/2", "1"),
}
ACCUMULATION, CALLS = "accumulation", "calls"
CALLS_WIDTH = 16  # of the small matrices


@dataclass(frozen=True, slots=True)
class Growth:
    """What to step: one rule at every point along ``along``, on ``shapes`` changed accordingly."""

    along: str
    rule: str
    rank: str
    points: tuple[str, ...]
    shapes: ModelShapes
    device: torch.device
    dtype: torch.dtype
    rounds: int | None
    seconds: float
    seed: int

    @property
    def anchor(self) -> str:
        """The point in the middle."""
        return self.points[len(self.points) // 2]

    def value(self, point: str) -> float:
        return float(parse_rank(point)) if self.along == "rank" else float(point)

    def shapes_at(self, point: str) -> ModelShapes:
        if self.along == "layers":
            return replace(self.shapes, layers=int(point))
        if self.along == "width":
            return self.shapes.of_width(int(point))
        return self.shapes

    def fraction_at(self, point: str) -> float:
        """The rank fraction; of Muon, which keeps no basis, 0."""
        if self.rule == "muon":
            return 0.0
        return float(parse_rank(point if self.along == "rank" else self.rank))

    def optimizer_at(self, point: str, weights: list[torch.nn.Parameter]) -> RuleOptimizer:
        fraction = self.fraction_at(point)
        options: dict[str, Any] = {"rank_fraction": fraction} if fraction else {}
        return RULES[self.rule](weights, lr=LR, **options)


def growth_of(config: BenchConfig, shapes: ModelShapes, ranks: Sequence[str]) -> Growth:
    """What the flags ask for, checked."""
    assert config.growth is not None
    check_numbers(config)
    along, device = config.growth, find_device(config.device)
    settle(config)
    if len(config.only) > 1:
        raise ValueError(f"--only names {len(config.only)} contestants: growth is seen of one, such as --only muon.")
    name = config.only[0] if config.only else ("dion" if along == "rank" else "dion-1/4")
    if along == "rank":
        rule, rank = name, ""
        if name not in ("dion", "dion-tail"):
            raise ValueError(f"--only {name!r} has no rank to grow: give dion or dion-tail, and ranks as --points.")
    else:
        (chosen, *_) = choose(rules_alone(all_contestants(["1/4", *ranks])), [name])
        rule, _, rank = ("muon", "", "") if chosen.name == "muon" else chosen.name.rpartition("-")
    points = check_points(along, config.points or POINTS[along])
    dtype: torch.dtype = getattr(torch, config.dtype)
    asked = Growth(along, rule, rank, points, shapes, device, dtype, config.rounds, config.seconds, config.seed)
    who = f"{len(points)} points from {points[0]} to {points[-1]}"
    check_memory(who, memory_needed(asked), device, "give smaller --points or fewer --layers")
    return asked


def check_points(along: str, points: Sequence[str]) -> tuple[str, ...]:
    """The points, smallest first; what is none is a ``ValueError``."""
    if along == "rank":
        return tuple(str(point) for point in sorted({parse_rank(point) for point in _several(points)}))
    wrong = [point for point in points if not point.isdecimal() or int(point) < 1]
    if wrong:
        raise ValueError(f"--points {wrong[0]!r} is no number of layers or width: give whole numbers, such as 1 2 4 8.")
    return tuple(str(point) for point in sorted({int(point) for point in _several(points)}))


def _several(points: Sequence[str]) -> Sequence[str]:
    if len(set(points)) < 2:
        raise ValueError("--points: give 2 or more, for growth is seen between points.")
    return points


def memory_needed(growth: Growth) -> int:
    """About how many bytes are held at once: each point's weights and state, the gradients, one step's temporaries."""
    sizes = {point: growth.shapes_at(point).elements for point in growth.points}
    gradients = sum(sizes.values()) if growth.along == "width" else max(sizes.values())
    kept = sum(size * (2 + growth.fraction_at(point)) for point, size in sizes.items())
    return int((gradients + kept + 2 * max(sizes.values())) * growth.dtype.itemsize)


def measure_growth(growth: Growth, progress: Progress = lambda what, share: None) -> dict[str, Any]:
    """Steps at every point, in turn; the file's contents."""
    load_before = environment.load()
    warm_up(growth.device, growth.dtype)
    steps: dict[str, Callable[[], object]] = {}
    costs: dict[str, Cost] = {}
    work: Workload | None = None
    for k, point in enumerate(reversed(growth.points)):  # the largest first: fewer layers share its gradients
        progress(f"first step: {growth.along} {point}", k / len(growth.points))
        shapes = growth.shapes_at(point)
        if work is None or growth.along == "width":
            work = Workload(shapes, growth.device, growth.dtype, seed=growth.seed)
        weights = work.parameters(len(shapes.matrices))
        optimizer = growth.optimizer_at(point, weights)
        costs[point] = step_cost(build_plan(optimizer.param_groups, None), optimizer.param_groups)
        steps[point] = optimizer.step
        optimizer.step()
        if point == growth.anchor:
            gradients = work.gradients[: len(weights)]
            wide = torch.promote_types(growth.dtype, torch.float32)  # as state is
            small = Workload(shapes.of_width(CALLS_WIDTH), growth.device, growth.dtype, seed=growth.seed)
            steps[CALLS] = growth.optimizer_at(point, small.parameters()).step
            steps[CALLS]()
            steps[ACCUMULATION] = partial(_accumulate, [g.to(wide, copy=True) for g in gradients], gradients)
    spreads = run_rounds(
        steps,
        clock(growth.device),
        growth.rounds,
        growth.seconds,
        growth.seed,
        progress=lambda done, share: progress(f"round {done}", share),
    )
    elements = growth.shapes_at(growth.anchor).elements
    wide = torch.promote_types(growth.dtype, torch.float32)
    moved = elements * (2 * wide.itemsize + growth.dtype.itemsize)
    return {
        "growth": growth.along,
        "rule": growth.rule,
        "rank": None if growth.rule == "muon" or growth.along == "rank" else growth.rank,
        "model": growth.shapes.name,
        "layer": growth.shapes.layer,
        "layers": None if growth.along == "layers" else growth.shapes.layers,
        "device": str(growth.device),
        "dtype": str(growth.dtype).removeprefix("torch."),
        **environment.describe(growth.device),
        "load_before": load_before,
        "load_after": environment.load(),
        **results(
            [
                Point(point, growth.value(point), len(growth.shapes_at(point).matrices), spreads[point], costs[point])
                for point in growth.points
            ],
            growth.anchor,
            moved / spreads[ACCUMULATION].median,
            spreads[CALLS].median / len(growth.shapes_at(growth.anchor).matrices),
        ),
    }


def _accumulate(momenta: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    for momentum, gradient in zip(momenta, gradients, strict=True):
        momentum.add_(gradient)
