"""A mesh that exists only as a description, and a model without weights placed on it, as rank 0 would see it.

    dp      replicas                      every parameter whole
    fsdp    fully_shard                   cuts dim 0 of every parameter; of the local part, if tp cuts it too
    ep      expert parallelism            cuts dim 0 of experts, whose rows fsdp then cuts; else dim 0, like fsdp
    tp      tensor parallelism            cuts rows or columns, by the model's own plan (`tp_plan`)

Experts under fsdp and ep are placed as torchtitan does if ep and fsdp share the data-parallel ranks. The process group
is torch's fake one, which has sizes and ranks and sends nothing. May import torch and ``orthoshard.layout``.
"""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

AXES = ("dp", "fsdp", "ep", "tp")

# transformers' names of tensor-parallel styles, by the dimension of the weight (..., out, in) that they cut.
OUT_STYLES = ("colwise", "packed_colwise", "embedding_rowwise")
IN_STYLES = ("rowwise", "packed_rowwise", "embedding_colwise")
MOST_RANKS = 1 << 20


def read_mesh(text: str) -> dict[str, int]:
    """Return the sizes in a text such as ``"fsdp=64,tp=8"``, in the order of `AXES`, without axes of one rank.

    Raises ValueError.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f"did you mean {near[0]!r}? They" if near else "they"
            raise ValueError(f"a mesh has no axis {name!r}; {hint} are {', '.join(AXES)}, such as fsdp=64,tp=8")
        if name in sizes:
            raise ValueError(f"the mesh {text!r} has the axis {name!r} twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"the axis {part!r} needs a number of ranks, such as {name}=8")
        sizes[name] = int(size)
    if prod(sizes.values()) > MOST_RANKS:
        raise ValueError(f"the mesh {text!r} has more than {MOST_RANKS} ranks")
    return {name: sizes[name] for name in AXES if sizes.get(name, 1) > 1}


def check_sizes(sizes: Mapping[str, int], name: str, settings: Any, experts: Iterable[Tensor]) -> None:
    """Check that the sizes of axes divide what they cut of the model ``name``. Raises ValueError.

    tp must divide the number of attention heads in the configuration ``settings``, ep the number of experts.
    """
    heads = getattr(settings, "num_attention_heads", None)
    if isinstance(heads, int) and heads % sizes.get("tp", 1):
        raise ValueError(f"tp={sizes['tp']} does not divide the {heads} attention heads of {name}; choose a divisor")
    for stack in experts:
        if stack.shape[0] % sizes.get("ep", 1):
            raise ValueError(
                f"ep={sizes['ep']} does not divide the {stack.shape[0]} experts of {name}; choose a divisor"
            )


@contextmanager
def described_mesh(sizes: Mapping[str, int]) -> Generator[DeviceMesh | None]:
    """Yield the mesh as rank 0 sees it, without other ranks, or None for one process."""
    if not sizes:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(sizes.values()))
    try:
        yield init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        dist.destroy_process_group()


def place(model: nn.Module, mesh: DeviceMesh, experts: set[int]) -> None:
    """Replace every parameter by the DTensor that rank 0 would hold, on meta. ``experts`` are ids of parameters.

    Raises ValueError if the mesh has an axis that cannot cut anything in the model.
    """
    names = mesh.mesh_dim_names or ()
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    if "tp" in names and not plan:
        raise ValueError(f"{type(model).__name__} has no plan for tensor parallelism; leave tp out of the mesh")
    if "ep" in names and not experts:
        raise ValueError(f"{type(model).__name__} has no experts; leave ep out of the mesh")
    placed: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in placed:
                name = f"{prefix}.{leaf}" if prefix else leaf
                dim = _cut_by_tp(name, leaf, parameter, plan) if "tp" in names else None
                placements = _placements(names, parameter, dim, id(parameter) in experts, mesh)
                placed[id(parameter)] = _as_rank_0(parameter, mesh, placements)
            module._parameters[leaf] = placed[id(parameter)]


def _cut_by_tp(name: str, leaf: str, parameter: Tensor, plan: Mapping[str, str]) -> int | None:
    """Return the dimension of the parameter that tensor parallelism cuts, or None."""
    layer = name.rpartition(".")[0]
    style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
    style = style or next((style for pattern, style in plan.items() if fnmatchcase(layer, pattern)), "")
    rowwise = style.startswith(IN_STYLES)
    if not style.startswith(OUT_STYLES) and not rowwise:
        return None
    if parameter.ndim < 2:
        return None if rowwise else 0
    return parameter.ndim - 1 if rowwise else parameter.ndim - 2


def _placements(
    names: tuple[str, ...], parameter: Tensor, tp_dim: int | None, expert: bool, mesh: DeviceMesh
) -> list[Placement]:
    apart = expert and "ep" in names
    cut: dict[str, int | None] = {"dp": None, "tp": tp_dim, "ep": 0, "fsdp": parameter.ndim - 2 if apart else 0}
    if not parameter.ndim:
        cut = dict.fromkeys(AXES)
    placements: list[Placement] = []
    for name in names:
        dim = cut[name]
        if dim is None:
            placements.append(Replicate())
        elif name != "tp" and dim == cut["tp"] and "tp" in names:
            placements.append(_StridedShard(dim, split_factor=mesh.size(names.index("tp"))))
        else:
            placements.append(Shard(dim))
    return placements


def _as_rank_0(parameter: nn.Parameter, mesh: DeviceMesh, placements: list[Placement]) -> nn.Parameter:
    lengths = list(parameter.shape)
    for i, placement in enumerate(placements):
        if isinstance(placement, (Shard, _StridedShard)):
            lengths[placement.dim] = -(-lengths[placement.dim] // mesh.size(i))
    local: Any = torch.empty(lengths, dtype=parameter.dtype, device="meta")
    whole = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
