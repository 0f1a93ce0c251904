"""A model that is planned for: placed on a mesh that is only described, and in the plain numbers of the calculator.

Parameters that a token meets: all, but of E experts the k that it is sent to. May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from orthoshard import param_groups
from orthoshard.explain.mesh import described_mesh, place
from orthoshard.grouping import claims
from orthoshard.groups import complete
from orthoshard.models import Described, describe
from orthoshard.plan import Entry, Plan, build_plan
from orthoshard.planner.even import Kind, Model

# How configurations of transformers name the experts that a token is sent to.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Subject:
    """``parameters`` of the model, ``active`` of them a token meets; ``experts``: by identity."""

    described: Described
    module: nn.Module
    parameters: int
    active: float
    experts: frozenset[int]
    plain: tuple[tuple[nn.Module, str, nn.Parameter], ...]

    @contextmanager
    def placed(self, sizes: dict[str, int], *, own_gradients: bool = False) -> Generator[Placed]:
        """On the mesh, as its rank 0 sees it. ``own_gradients``: axis dp is known to the optimizer alone."""
        self._restore()
        with described_mesh(sizes) as mesh:
            yield self.place(mesh, own_gradients)
        self._restore()

    def place(self, mesh: DeviceMesh | None, own_gradients: bool = False) -> Placed:
        """On a mesh that is described already."""
        self._restore()
        group = None
        if mesh is not None:
            names = mesh.mesh_dim_names or ()
            if own_gradients and "dp" in names:
                group = mesh["dp"].get_group()
                names = tuple(name for name in names if name != "dp")
                mesh = mesh[names] if names else None
            if mesh is not None:
                place(self.module, mesh, set(self.experts))
        return Placed(self.module, group)

    def _restore(self) -> None:
        for module, leaf, parameter in self.plain:
            module._parameters[leaf] = parameter


@dataclass(frozen=True)
class Placed:
    """``group``: replicas that bring gradients of their own."""

    module: nn.Module
    group: Any

    def plan(self, rule: str, **options: Any) -> tuple[Plan, list[dict[str, Any]]]:
        """What the optimizer of this rule would do, and its groups."""
        common = {key: options.pop(key) for key in ("replica_compute", "replica_sync", "shard_state") if key in options}
        groups = param_groups(self.module, matrix=rule, **options)
        groups = [complete(group, {"rule": rule, "seed": 0, **common}) for group in groups]
        return build_plan(groups, self.group), groups


def subject(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    """Raises ValueError for a model that is nowhere."""
    described = describe(name)
    module = described.on_meta(dtype)
    experts = frozenset(id(claim.parameter) for claim in claims(module) if claim.role == "experts")
    plain = tuple(
        (layer, leaf, parameter)
        for layer in module.modules()
        for leaf, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
    )
    total = sum(parameter.numel() for parameter in module.parameters())
    return Subject(described, module, total, _active(described, module, experts, total), experts, plain)


def _active(described: Described, module: nn.Module, experts: frozenset[int], total: int) -> float:
    chosen = next((getattr(described.settings, key) for key in CHOSEN if hasattr(described.settings, key)), None)
    if not experts or chosen is None:
        return float(total)
    unused = 0.0
    for parameter in module.parameters():
        if id(parameter) in experts and parameter.ndim > 2:
            unused += parameter.numel() * (1 - chosen / parameter.shape[0])
    return total - unused


def calculator_inputs(name: str) -> dict[str, Any]:
    """What `even.amounts` has to know of a model, as plain values: ``name``, ``source``, ``parameters`` (entries),
    ``active``, and ``model``: the fields of `even.Model`. tp False: the model does not say how tp would cut it."""
    chosen = subject(name)
    tensor_parallel = bool(getattr(chosen.module, "tp_plan", None))
    with chosen.placed({"fsdp": 2, **({"tp": 2} if tensor_parallel else {})}) as placed:
        plan, _ = placed.plan("muon")
        model = plain_numbers(plan)
    return {
        "name": chosen.described.name,
        "source": chosen.described.source,
        "parameters": chosen.parameters,
        "active": chosen.active,
        "tp": tensor_parallel,
        "model": {
            "kinds": [vars(kind) for kind in model.kinds],
            "scalars": list(model.scalars),
            "tensors": model.tensors,
            "parameters": model.parameters,
        },
    }


def plain_numbers(plan: Plan) -> Model:
    """The plan of a matrix rule on a mesh of fsdp and tp, as the calculator sees the model."""
    kinds, scalars, tensors = Counter[tuple[int, int, str, str]](), [0.0, 0.0], 0
    for bucket in plan.buckets:
        first = bucket.entries[0]
        for work in bucket.works:
            kinds[*work.part.matrix, _cut(first, "tp"), _cut(first, "fsdp")] += work.matrices
        if not bucket.works:
            tensors += len(bucket.entries)
            for entry in bucket.entries:
                cut = any(axis.name == "tp" for axes in entry.layout.cuts for axis in axes)
                scalars[0 if cut else 1] += prod(entry.shape)
    return Model(
        tuple(Kind(m, n, count, tp, fsdp) for (m, n, tp, fsdp), count in kinds.items()),
        (scalars[0], scalars[1]),
        tensors,
        len(plan.entries),
    )


def _cut(entry: Entry, name: str) -> str:
    """What an axis cuts of a parameter's matrices: "rows", "columns", the "stack" of them, or "" nothing."""
    reading = entry.reading
    dim = next((dim for dim, axes in enumerate(entry.layout.cuts) if any(axis.name == name for axis in axes)), None)
    if dim is None or reading is None:
        return ""
    return "rows" if dim in reading.dims("rows") else "columns" if dim in reading.dims("columns") else "stack"
