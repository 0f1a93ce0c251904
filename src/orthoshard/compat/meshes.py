"""Checks of mesh arguments against the parameters' placements, which make them unnecessary. May import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]


def check_meshes(params: Any, meshes: dict[str, Any]) -> None:
    """Raise ValueError if a parameter is sharded over other ranks than those of the ``meshes`` (by argument name), and
    TypeError for a mesh that is none. ``params``: anything that an optimizer can be given."""
    given = {name: ranks_of(name, mesh) for name, mesh in meshes.items() if mesh is not None}
    for parameter in parameters_of(params) if given else ():
        for axis, ranks in axes_of(parameter, sharded=True):
            if ranks not in given.values():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is sharded over mesh axis {axis!r}, ranks {ranks}, "
                    f"and not over {' or '.join(f'{name}, ranks {its}' for name, its in given.items())}: give the mesh "
                    f"that shards it, or none, since its placements tell how it is sharded"
                )


def refuse_averaged(params: Any, argument: str, mesh: Any) -> None:
    """Raise ValueError if the gradients that the optimizer is to average over ``mesh`` are averaged already."""
    over = None if mesh is None else ranks_of(argument, mesh)
    for parameter in parameters_of(params):
        if any(ranks == over for _, ranks in axes_of(parameter, sharded=False)):
            raise ValueError(
                f"{argument} is an axis of the parameters' own mesh, over which fully_shard averages gradients: set "
                f"replicate_mesh_grad_sync=False, or give fully_shard the shard mesh alone"
            )


def plain_replicas(params: Any, mesh: Any) -> Any:
    """Return ``mesh`` if it is needed for plain tensors, which it replicates, else None: DTensors have placements."""
    return mesh if any(not isinstance(parameter, DTensor) for parameter in parameters_of(params)) else None


def ranks_of(name: str, mesh: Any) -> Ranks:
    """Return the ranks of a mesh of one dimension, or of a process group. Raises TypeError or ValueError for others."""
    if not isinstance(mesh, (DeviceMesh, dist.ProcessGroup)):
        raise TypeError(f"{name} is a {type(mesh).__name__}; give a DeviceMesh or a ProcessGroup, or leave it out")
    if isinstance(mesh, DeviceMesh) and mesh.ndim != 1:
        raise ValueError(f"{name} has {mesh.ndim} dimensions: give one such as mesh['shard'], or mesh._flatten()")
    return tuple(dist.get_process_group_ranks(mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh))


def axes_of(parameter: Tensor, *, sharded: bool) -> Iterator[tuple[str, Ranks]]:
    """Yield name and ranks of each axis of more than one rank that shards a parameter; if not ``sharded``, that
    replicates it."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or tuple(f"{axis}" for axis in range(mesh.ndim))
        for axis, placement in enumerate(parameter.placements):
            if placement.is_replicate() != sharded and mesh.size(axis) > 1:
                yield names[axis], tuple(dist.get_process_group_ranks(mesh.get_group(axis)))


def parameters_of(params: Any) -> Iterator[Tensor]:
    """Yield every parameter of a model, groups, pairs, or whatever else an optimizer is given."""
    if isinstance(params, nn.Module):
        yield from params.parameters()
    elif isinstance(params, Tensor):
        yield params
    else:
        for each in params:
            if isinstance(each, dict):
                yield from parameters_of(each.get("params", ()))
            else:
                yield each[1] if isinstance(each, tuple) else each
