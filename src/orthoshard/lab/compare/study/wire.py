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

The count is that of a step run dry, which tests hold to the counter of real steps on every layout
(`tests/layouts/table.py`), on CPUs, where nothing travels in 16 bits. May import torch and ``orthoshard``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from orthoshard.budget import agreement_bytes, step_cost
from orthoshard.lab.explain.mesh import described_mesh
from orthoshard.optimizer import RuleOptimizer

ITEM = 4  # bytes of a float32
LAYOUTS = ("replicas", "rows", "columns")


@dataclass(frozen=True)
class Setting:
    """The matrices to count. ``rules`` has label, rule name and rank fraction (0 if the rule has none) of each rule."""

    m: int
    n: int
    ranks: int
    rules: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Line:
    """Bytes of one matrix on one rank. The state is that of whole matrices, in one process."""

    label: str
    layout: str
    formula: float
    counted: float


def formula(rule: str, layout: str, m: int, n: int, r: int, ranks: int) -> float:
    """Return the bytes by the formulas of the header; ``layout`` may also be "state"."""
    ring = 2 * (ranks - 1) / ranks * ITEM
    if layout == "state":
        return ITEM * {"adamw": 2 * m * n, "muon": m * n, "dion": m * n + m * r}[rule]
    if rule == "dion":
        return ring * r * {"replicas": m + n, "rows": n, "columns": m + n / ranks}[layout]
    if layout == "replicas":
        return ring * m * n
    return 0.0 if rule == "adamw" else ring / ranks * m * n


def count(setting: Setting) -> list[Line]:
    """Return one line for each rule and layout, and for its state."""
    lines: list[Line] = []
    for label, rule, fraction in setting.rules:
        r = rank(setting, fraction)
        for layout in ("state", *LAYOUTS):
            said = formula(rule, layout, setting.m, setting.n, r, setting.ranks)
            with described_mesh({"fsdp": setting.ranks}) as mesh:
                assert mesh is not None
                lines.append(Line(label, layout, said, _counted(setting, rule, fraction, layout, mesh)))
    return lines


def rank(setting: Setting, fraction: float) -> int:
    return round(fraction * min(setting.m, setting.n))


def _counted(setting: Setting, rule: str, fraction: float, layout: str, mesh: DeviceMesh) -> float:
    options: dict[str, Any] = {"rule": rule, "shard_compute": "in_place" if rule == "dion" else "dealt"}
    if rule == "dion":
        options["rank_fraction"] = fraction
    if layout == "replicas":
        options |= {"process_group": mesh.get_group(), "replica_compute": "repeat"}
        options["replica_sync"] = "factors" if rule == "dion" else "gradients"
    parameters = [_parameter(setting, layout, mesh) for _ in range(setting.ranks)]
    optimizer = RuleOptimizer(parameters, **options)
    plan = optimizer.plan()
    cost = step_cost(plan, optimizer.param_groups)
    return float(cost.state if layout == "state" else cost.wire + agreement_bytes(plan)) / setting.ranks


def _parameter(setting: Setting, layout: str, mesh: DeviceMesh) -> nn.Parameter:
    whole = torch.empty(setting.m, setting.n)  # never touched
    if layout not in ("rows", "columns"):
        return nn.Parameter(whole)
    dim = 0 if layout == "rows" else 1
    local = whole.chunk(setting.ranks, dim)[0].contiguous()
    return nn.Parameter(
        DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())
    )


def rows(lines: list[Line]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]
