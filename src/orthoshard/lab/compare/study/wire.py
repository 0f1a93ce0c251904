"""Bytes that one rank sends, and keeps, for one matrix: a closed formula beside the library's own count.

W (m, n) in float32, N ranks, N such matrices (so that each rank owns one), rank r of Dion, q = 4 bytes. Per matrix:

                 state on a        replicas                rows cut (FSDP)       columns cut (tensor
                 whole matrix      (gradients averaged)                          parallelism)
    AdamW        2 m n q           2 (N-1)/N m n q         0                     0
    Muon         m n q             2 (N-1)/N m n q         2 (N-1)/N² m n q      2 (N-1)/N² m n q
    Dion         (m n + m r) q     2 (N-1)/N (m + n) r q   2 (N-1)/N n r q       2 (N-1)/N (m + n/N) r q

A ring sends 2 (N-1)/N of what is averaged (Patarasuk & Yuan, 2009, section 3); a matrix that travels whole to its owner
and back sends what is not its own each way. Replicas of AdamW and Muon average gradients, those of Dion the factors
P (n, r) and R (m, r) ("compressed gradient sync", arXiv 2504.05295). Cut by rows, P is a sum over
the ranks and R is not; cut by columns, R is a sum and P goes to its owner and back. What FSDP and tensor parallelism
themselves send for gradients and activations is no part of it. The count adds what the formula leaves out: largest
entries, column norms, and the agreement on missing and bad gradients.

Counted by gloo processes that take two real steps. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from orthoshard.optimizer import RuleOptimizer

ITEM = 4  # bytes of a float32
LAYOUTS = ("replicas", "rows", "columns")


@dataclass(frozen=True)
class Setting:
    """``rules``: label, rule name and rank fraction (0 where the rule has none)."""

    m: int
    n: int
    ranks: int
    rules: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Line:
    """Bytes of one matrix on one rank. State is that of whole matrices, in one process."""

    label: str
    layout: str
    formula: float
    counted: float


def formula(rule: str, layout: str, m: int, n: int, r: int, ranks: int) -> float:
    """Bytes as in the header; ``layout`` is also "state"."""
    ring = 2 * (ranks - 1) / ranks * ITEM
    if layout == "state":
        return ITEM * {"adamw": 2 * m * n, "muon": m * n, "dion": m * n + m * r}[rule]
    if rule == "dion":
        return ring * r * {"replicas": m + n, "rows": n, "columns": m + n / ranks}[layout]
    if layout == "replicas":
        return ring * m * n
    return 0.0 if rule == "adamw" else ring / ranks * m * n


def count(setting: Setting) -> list[Line]:
    """One line for each rule and layout, and for its state."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        mp.start_processes(_rank, (setting, folder, str(results)), setting.ranks, start_method="spawn")
        counted: dict[str, dict[str, float]] = torch.load(results, weights_only=True)
    lines: list[Line] = []
    for label, rule, fraction in setting.rules:
        r = rank(setting, fraction)
        for layout in ("state", *LAYOUTS):
            said = formula(rule, layout, setting.m, setting.n, r, setting.ranks)
            lines.append(Line(label, layout, said, counted[label][layout]))
    return lines


def rank(setting: Setting, fraction: float) -> int:
    return round(fraction * min(setting.m, setting.n))


def _rank(number: int, setting: Setting, folder: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=setting.ranks)
    found = measure(setting, number)
    if number == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()


def measure(setting: Setting, number: int) -> dict[str, dict[str, float]]:
    """Bytes of one matrix by label and layout, or "state", as this rank counts them; called on every rank."""
    mesh = init_device_mesh("cpu", (setting.ranks,), mesh_dim_names=("ranks",))
    found: dict[str, dict[str, float]] = {}
    for label, rule, fraction in setting.rules:
        # on the shards, as the paper has it
        low_rank = {"rank_fraction": fraction, "shard_compute": "in_place"} if rule == "dion" else {}
        options: dict[str, Any] = {"rule": rule, **low_rank}
        found[label] = {"state": _state(setting, options)}
        for layout in LAYOUTS:
            found[label][layout] = _sent(setting, options, layout, mesh, number)
    return found


def _state(setting: Setting, options: dict[str, Any]) -> float:
    optimizer = RuleOptimizer(_parameters(setting, lambda whole: whole), **options)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return sum(x.numel() * x.element_size() for x in kept if isinstance(x, Tensor) and x.ndim) / setting.ranks


def _sent(setting: Setting, options: dict[str, Any], layout: str, mesh: Any, number: int) -> float:
    """By this rank in the second step: the first compares plans too."""
    if layout == "replicas":
        sync = "factors" if options["rule"] == "dion" else "gradients"
        options = {**options, "process_group": mesh.get_group(), "replica_sync": sync, "replica_compute": "repeat"}
        optimizer = RuleOptimizer(_parameters(setting, lambda whole: whole, seed=number), **options)
    else:
        dim = 0 if layout == "rows" else 1
        optimizer = RuleOptimizer(_parameters(setting, lambda whole: _cut(whole, mesh, dim)), **options)
    optimizer.step()
    before = optimizer.bytes_sent
    optimizer.step()
    return float(optimizer.bytes_sent - before) / setting.ranks


def _parameters(setting: Setting, place: Callable[[Tensor], Tensor], seed: int = 0) -> list[nn.Parameter]:
    """As many matrices as ranks; the gradients depend on the seed, the weights do not."""
    weights, gradients = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    made: list[nn.Parameter] = []
    for _ in range(setting.ranks):
        parameter = nn.Parameter(place(torch.randn(setting.m, setting.n, generator=weights)))
        parameter.grad = place(torch.randn(setting.m, setting.n, generator=gradients))
        made.append(parameter)
    return made


def _cut(whole: Tensor, mesh: Any, dim: int) -> Tensor:
    local = whole.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())


def rows(lines: list[Line]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]
