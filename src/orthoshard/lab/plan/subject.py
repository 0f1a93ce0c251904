"""The model of a plan, placed on a mesh that exists only as a description.

The active parameters of a token are all except experts that it is not sent to: it uses k of E. May import torch and
``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from orthoshard import param_groups
from orthoshard.grouping import claims
from orthoshard.groups import complete
from orthoshard.lab.explain.mesh import described_mesh, place
from orthoshard.lab.models import Described, describe
from orthoshard.plan import Plan, build_plan

# Names in transformers' configurations for the number of experts that a token is sent to.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Subject:
    """A model. ``active`` of its ``parameters`` are used for a token; ``experts`` are ids of parameters."""

    described: Described
    module: nn.Module
    parameters: int
    active: float
    experts: frozenset[int]
    plain: tuple[tuple[nn.Module, str, nn.Parameter], ...]

    @contextmanager
    def placed(self, sizes: dict[str, int], *, own_gradients: bool = False) -> Generator[Placed]:
        """Yield the model on a mesh, as rank 0 sees it. With ``own_gradients`` only the optimizer knows the axis dp."""
        self._restore()
        with described_mesh(sizes) as mesh:
            yield self.place(mesh, own_gradients)
        self._restore()

    def place(self, mesh: DeviceMesh | None, own_gradients: bool = False) -> Placed:
        """Place the model on a described mesh, and return it."""
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
    """A model on a mesh. ``group`` holds the replicas if they have their own gradients. ``known``: its parameter groups
    for each rule of matrices that was asked for."""

    module: nn.Module
    group: Any
    known: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def plan(self, rule: str, **options: Any) -> tuple[Plan, list[dict[str, Any]]]:
        """Return the plan of the optimizer of this rule, and its parameter groups."""
        if rule not in self.known:
            self.known[rule] = param_groups(self.module, matrix=rule)
        groups = [complete(group, {"rule": rule, "seed": 0, **options}) for group in self.known[rule]]
        return build_plan(groups, self.group), groups


def subject(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    """Return the model of a name or path. Raises ValueError for an unknown one."""
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
