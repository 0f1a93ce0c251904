"""Replicas of a model, each with all state or with that of its own matrices only: steps, bytes and state of both.

    ratio = step with ``shard_state="zero1"`` / step without

Both step in turn, in the same processes, from the same weights with the same gradients; a step ends when the slowest
replica has ended. ``difference``: how far their weights are apart after the last step, the share of the way that they
have gone. May import rich, torch and ``orthoshard``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from orthoshard.lab.bench.checks import check_memory, check_numbers
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import LR, parse_rank, random_gradient
from orthoshard.lab.bench.environment import describe, load
from orthoshard.lab.bench.files import claim, write_json
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.processes import run_ranks
from orthoshard.lab.bench.sharded import WARM_UP, Setting, tell, timed
from orthoshard.optimizer import RuleOptimizer

MODES = ("none", "zero1")
# Of the weights' bytes, at each replica: gradients, and for both modes weights and state, and a step's temporaries.
COPIES = 1 + 2 + 2.5 + 1.5


@dataclass(frozen=True)
class Replica:
    """One of the two: its parameters, and the optimizer on them."""

    parameters: list[nn.Parameter]
    optimizer: RuleOptimizer

    def bytes_of_a_step(self) -> float:
        before = self.optimizer.bytes_sent
        self.optimizer.step()
        return float(self.optimizer.bytes_sent - before)

    def state(self) -> float:
        """Bytes."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return float(sum(value.numel() * value.element_size() for value in held))


def run_owners(config: BenchConfig, shapes: ModelShapes, ranks: Sequence[str], folder: Path, console: Console) -> int:
    """``bench --owners N``: the measurement, its file in ``folder`` and its table."""
    check_numbers(config)
    if config.owners < 2:
        raise ValueError(f"--owners is {config.owners}; give 2 or more replicas, or leave it out.")
    rivals = [(f"dion-{rank}", {"rule": "dion", "rank_fraction": float(parse_rank(rank))}) for rank in ranks]
    rivals = [row for row in [*rivals, ("muon", {"rule": "muon"})] if not config.only or row[0] in config.only]
    if not rivals:
        raise ValueError(f"--only {' '.join(config.only)} names none of dion-R and muon, which --owners times.")
    out = config.out or folder / f"{shapes.name}-{config.owners}-owners.json"
    needed = int(config.owners * COPIES * 4 * shapes.elements)
    check_memory(f"{config.owners} replicas of {shapes.name}", needed, torch.device("cpu"), "take fewer --layers")
    claim(out)
    setting = Setting(config.owners, 1, tuple(shapes.matrices), tuple(rivals), config.rounds or 5, config.seed)
    about = {"model": shapes.name, "replicas": config.owners, "layers": shapes.layers, "load_before": load()}
    rows = measure_owners(setting)
    write_json(out, {**about, **describe(), "threads": 1, "load_after": load(), "contestants": rows})
    columns = ("", "step, ms", "owners", "ratio", "MB sent", "owners", "state, MB", "owners", "apart")
    sheet = Table(*columns, title=f"one step of {shapes.name} at {config.owners} replicas (medians; the most of any)")
    for name, row in rows.items():
        times = [f"{row[mode]['ms']:.0f}" for mode in MODES]
        amounts = [f"{row[mode][what] / 1e6:.1f}" for what in ("bytes", "state") for mode in MODES]
        sheet.add_row(name, *times, f"{row['ratio']:.2f}", *amounts, f"{row['difference']:.1e}")
    console.print(sheet)
    console.print(f"All times: {out}", highlight=False, soft_wrap=True)
    return 0


def measure_owners(setting: Setting) -> dict[str, Any]:
    """For each rival and mode ``ms``, ``times_ms``, ``bytes`` sent and ``state`` held; the ratio of medians, and the
    difference of weights."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        run_ranks(_rank, (setting, folder, str(results)), setting.processes)
        return torch.load(results, weights_only=True)


def _rank(rank: int, setting: Setting, folder: str, results: str) -> None:
    torch.set_num_threads(setting.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.processes)
    gradients = _drawn(setting, setting.seed, 1e-3)
    rows: dict[str, Any] = {}
    for k, (name, options) in enumerate(setting.rivals, 1):
        tell(rank, f"{name}, {k} of {len(setting.rivals)}")
        rows[name] = _rival(setting, options, gradients)
    if rank == 0:
        torch.save(rows, results)
    dist.barrier()
    dist.destroy_process_group()


def _rival(setting: Setting, options: dict[str, Any], gradients: list[Tensor]) -> dict[str, Any]:
    start = _drawn(setting, setting.seed + 1, 0.02)
    both = {mode: _replica(start, gradients, {**options, "shard_state": mode}) for mode in MODES}
    for _ in range(WARM_UP):
        for replica in both.values():
            replica.optimizer.step()
    amounts = {mode: _most([replica.bytes_of_a_step(), replica.state()]) for mode, replica in both.items()}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(setting.rounds):
        for mode, replica in both.items():
            times[mode].append(timed(replica.optimizer.step))
    medians = {mode: statistics.median(times[mode]) for mode in MODES}
    row: dict[str, Any] = {
        mode: {"ms": medians[mode], "bytes": amounts[mode][0], "state": amounts[mode][1], "times_ms": times[mode]}
        for mode in MODES
    }
    way = _norm([p - w for p, w in zip(both["none"].parameters, start, strict=True)])
    apart = _norm([p - q for p, q in zip(both["none"].parameters, both["zero1"].parameters, strict=True)])
    return {**row, "ratio": medians["zero1"] / medians["none"], "difference": _most([apart / way])[0]}


def _replica(weights: Sequence[Tensor], gradients: Sequence[Tensor], options: dict[str, Any]) -> Replica:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return Replica(parameters, RuleOptimizer(parameters, lr=LR, process_group=dist.group.WORLD, **options))


def _drawn(setting: Setting, seed: int, scale: float) -> list[Tensor]:
    """The same on every replica."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_gradient(m, n, "flat", generator, torch.float32) for m, n in setting.matrices]
    return [tensor * (scale / 1e-3) for tensor in drawn]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.detach().norm() for tensor in tensors]).norm())


def _most(values: Sequence[float]) -> list[float]:
    """Of any replica."""
    most = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()
