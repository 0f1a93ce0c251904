"""Where a parameter lives: which mesh axes cut which of its dimensions, and which replicate it. Pure and frozen.

The only file that knows DTensor. Several axes may cut one dimension, one inside the other. In a column-wise
tensor-parallel weight under `fully_shard`, the tensor-parallel axis cuts dim 0 first, and the axis of `fully_shard`
cuts each piece, which it records as `_StridedShard`. In the order of cutting, each local piece is one slice
[offset, offset + length) of the dimension. It has the length that torch.chunk gives it: uneven or empty if the
dimension does not divide. May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard, _StridedShard

# Attributes of a DTensor that say where it lives.
PLACED = ("placements", "device_mesh")
# What ranks that hold the same matrices do. "split": each does its share of the work. "repeat": each does all of it.
# "average": gradients differ, so each does all of it and tensors that are linear in the gradients are averaged.
# "own": each keeps the state of its own matrices only, and does their work.
Replicas = Literal["split", "repeat", "average", "average_bfloat16", "own"]
# The dtype in which averaged tensors travel; None: their own.
AVERAGE: dict[Replicas, torch.dtype | None] = {"average": None, "average_bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh, as this rank sees it.

    key         ranks of the mesh, its shape, and the number of the axis: the same on every rank. Not hashed, because
                a mesh may have thousands of ranks
    size        number of ranks along the axis
    coordinate  this rank's position along the axis
    """

    key: tuple[Any, ...] = field(hash=False)
    name: str
    size: int
    coordinate: int
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name}={self.size}"


@dataclass(frozen=True)
class Layout:
    """The sharding of one parameter.

    shape           shape of the whole tensor
    shard_axes      for each dimension, the axes that cut it, in the order of cutting
    replicas        the axes along which every rank holds the same values
    unreduced_axes  the replica axes along which gradients differ, because they reach the optimizer unaveraged
    """

    shape: tuple[int, ...]
    shard_axes: tuple[tuple[Axis, ...], ...]
    replicas: tuple[Axis, ...] = ()
    unreduced_axes: tuple[Axis, ...] = ()
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)
    placements: tuple[Placement, ...] = field(default=(), compare=False, repr=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis of more than one rank."""
        return (*(axis for axes in self.shard_axes for axis in axes), *self.replicas)

    @cached_property
    def local_slices(self) -> tuple[tuple[int, int], ...]:
        """(offset, length) of the local piece, for each dimension."""
        return tuple(local_slice(length, axes) for length, axes in zip(self.shape, self.shard_axes, strict=True))

    @cached_property
    def local(self) -> tuple[int, ...]:
        """The shape of the local piece."""
        return tuple(length for _, length in self.local_slices)

    def derive(self, dims: Sequence[int | None], shape: tuple[int, ...]) -> Layout:
        """Return the layout of a state tensor whose i-th dimension is cut as dimension ``dims[i]`` of this parameter,
        or not at all if that is None. Axes that cut none of its dimensions replicate it."""
        cuts = tuple(() if dim is None else self.shard_axes[dim] for dim in dims)
        used = [axis for axes in cuts for axis in axes]
        replicas = tuple(axis for axis in self.axes if axis not in used)
        followers = {dim: i for i, dim in enumerate(dims) if dim is not None}
        placements = tuple(_follow(placement, followers) for placement in self.placements)
        return Layout(shape, cuts, replicas, self.unreduced_axes, self.mesh, placements)

    def wrap(self, local: Tensor) -> Tensor:
        """Return a local piece as the tensor that users and checkpoints see: a DTensor if the parameter is one."""
        if self.mesh is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        there = local.device.type == self.mesh.device_type
        like = local if there else torch.empty_like(local, device="meta")  # from_local copies to the mesh's device
        wrapped = DTensor.from_local(
            like, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )
        if not there:
            return DTensor(local, wrapped._spec, requires_grad=False)
        # from_local takes a view, which would keep this memory alive after a host moves the piece by `.data = `
        wrapped._local_tensor = local
        return wrapped

    def holds(self, tensor: Any) -> bool:
        """Return whether a tensor can be taken over: it is whole, or it is placed exactly as this layout."""
        if not isinstance(tensor, DTensor):
            return True
        return tensor.device_mesh == self.mesh and tuple(tensor.placements) == self.placements

    def local_piece(self, tensor: Tensor) -> Tensor:
        """Return the local piece of a tensor that `holds` accepts."""
        return tensor.to_local() if isinstance(tensor, DTensor) else self.piece(tensor)

    def piece(self, whole: Tensor) -> Tensor:
        """Return the local piece of a whole tensor."""
        for dim, (offset, length) in enumerate(self.local_slices):
            whole = whole.narrow(dim, offset, length)
        return whole

    def __str__(self) -> str:
        names = {2: ("rows", "columns"), 3: ("batch", "rows", "columns")}.get(len(self.shape))
        parts = [
            f"{names[dim] if names else f'dim {dim}'} / {' / '.join(map(str, axes))}"
            for dim, axes in enumerate(self.shard_axes)
            if axes
        ]
        parts += [f"replicas {axis}" for axis in self.replicas]
        return ", ".join(parts) or "whole"


def local_slice(length: int, axes: Sequence[Axis]) -> tuple[int, int]:
    """Return (offset, length) of this rank's piece of a dimension that ``axes`` cut, one inside the other, as
    torch.chunk does: pieces of ceil(length / size) until nothing is left."""
    offset = 0
    for axis in axes:
        chunk = -(-length // axis.size)
        start = min(axis.coordinate * chunk, length)
        offset, length = offset + start, min(chunk, length - start)
    return offset, length


def pieces(length: int, size: int) -> list[int]:
    """Return the lengths of all pieces of a dimension that is cut once."""
    chunk = -(-length // size)
    return [max(0, min(chunk, length - i * chunk)) for i in range(size)]


def read_layout(
    name: str, parameter: Tensor, group: dist.ProcessGroup | None = None, own_gradients: bool = False
) -> Layout:
    """Return the layout of a parameter. The ranks of ``group`` are replicas of a plain tensor (DDP); with
    ``own_gradients`` they are replicas of a DTensor as well, and their gradients differ.

    Raises ValueError for `Partial` placements and for a mesh whose process group is gone.
    """
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Layout(shape, ((),) * len(shape), group_axis(group), group_axis(group) if own_gradients else ())
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    axes = mesh_axes(name, mesh)
    for axis, placement in zip(axes, placements, strict=True):
        if not isinstance(placement, (Replicate, Shard, _StridedShard)):
            raise ValueError(
                f"parameter {name!r} is {placement} on mesh axis {axis.name!r}: an unfinished sum cannot be trained; "
                f"redistribute it to Replicate() or Shard(dim) first"
            )
    cuts = _shard_axes(f"parameter {name!r}", len(shape), mesh, placements, axes)
    replicas = tuple(a for a, p in zip(axes, placements, strict=True) if isinstance(p, Replicate) and a.size > 1)
    sources = group_axis(group) if own_gradients else ()
    return Layout(shape, cuts, (*replicas, *sources), sources, mesh, placements)


def meshes_of(layouts: Sequence[Layout]) -> list[tuple[tuple[Axis, ...], list[int]]]:
    """Return each set of axes that holds parameters, with the numbers of these parameters."""
    found: dict[tuple[Axis, ...], list[int]] = {}
    for number, layout in enumerate(layouts):
        axes = tuple(sorted(layout.axes, key=lambda axis: axis.key))
        if axes:
            found.setdefault(axes, []).append(number)
    return list(found.items())


def _shard_axes(
    what: str, ndim: int, mesh: DeviceMesh, placements: Sequence[Placement], axes: Sequence[Axis]
) -> tuple[tuple[Axis, ...], ...]:
    """Return, for each dimension, the axes of more than one rank that cut it, in the order of cutting."""
    cutting: list[list[int]] = [[] for _ in range(ndim)]
    for i in reversed(range(len(placements))):
        placement = placements[i]
        if not isinstance(placement, (Shard, _StridedShard)):
            continue
        order = cutting[placement.dim % ndim]
        place = 0
        if isinstance(placement, _StridedShard):
            before = 1
            while before < placement.split_factor and place < len(order):
                before *= mesh.size(order[place])
                place += 1
            if before != placement.split_factor:
                raise ValueError(f"{what} has placements {placements}, whose order of cutting is unknown")
        order.insert(place, i)
    return tuple(tuple(axes[i] for i in order if axes[i].size > 1) for order in cutting)


def mesh_axes(name: str, mesh: DeviceMesh) -> list[Axis]:
    """Return the axes of a parameter's mesh. Raises ValueError if its process groups are gone."""
    coordinates = mesh.get_coordinate()
    names = mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim))
    if not dist.is_initialized() or coordinates is None:
        raise ValueError(
            f"the mesh of parameter {name!r} ({mesh}) has no process group here: build the optimizer on the ranks of "
            f"the mesh, after torch.distributed.init_process_group and before destroy_process_group"
        )
    ranks = _ranks(mesh, mesh.get_rank())
    return [
        Axis((*ranks, i), names[i], mesh.size(i), coordinates[i], mesh.get_group(i) if mesh.size(i) > 1 else None)
        for i in range(mesh.ndim)
    ]


@lru_cache(maxsize=64)
def _ranks(mesh: DeviceMesh, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return all ranks of a mesh, and its shape. Cached, because every parameter needs them, and thousands of ranks
    take long to read. ``rank`` is in the cache key because slices of a mesh compare equal on ranks that each have their
    own, and simulated ranks share this cache."""
    return tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh.shape)


def group_axis(group: dist.ProcessGroup | None) -> tuple[Axis, ...]:
    """Return a process group as an axis; none if it has one rank. Raises ValueError if the group is gone."""
    if group is None:
        return ()
    if not alive(group):
        raise ValueError(
            "the process group of the replicas does not belong to this process, or was destroyed: set "
            "optimizer.process_group to another, to a mesh of one dimension, or to None to continue without replicas"
        )
    if dist.get_world_size(group) == 1:
        return ()
    ranks = tuple(dist.get_process_group_ranks(group))
    return (Axis((ranks, (len(ranks),), 0), "replicas", len(ranks), dist.get_rank(group), group),)


def alive(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group can still be used: it was not destroyed, alone or with all others."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of a group; 0 if it is None or gone."""
    return dist.get_world_size(group) if group is not None and alive(group) else 0


def many_ranks() -> bool:
    """Return whether this process is one of several that can communicate."""
    return dist.is_initialized() and dist.get_world_size() > 1


def group_of(group: Any) -> Any:
    """Return the process group, given as itself or as a mesh of one dimension. Raises ValueError for other meshes."""
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        raise ValueError(
            f"process_group is a mesh of {group.ndim} dimensions; give the one over which parameters are replicated, "
            f"such as mesh['replicas']"
        )
    return group.get_group()


def local_of(tensor: Tensor) -> Tensor:
    """Return the local piece of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Misplaced:
    """The placement of a gradient that is not placed as its parameter.

    dims          the dimensions that are cut differently
    axes          the axes over which the ranks' pieces have to be added to give the gradient: they cut these
                  dimensions, or the gradient is an unfinished sum over them
    terms         divisor of each rank's piece before the sum: the number of ranks over which a mean is unfinished
    local_slices  (offset, length) of the local piece, for each dimension
    text          the placements, for messages
    """

    dims: tuple[int, ...]
    axes: tuple[Axis, ...]
    terms: int
    local_slices: tuple[tuple[int, int], ...]
    text: str


def local_gradient(name: str, parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Misplaced | None]:
    """Return the local piece of a gradient, and its placement if that differs from the parameter's.

    Raises RuntimeError if the gradient cannot be brought to the parameter's placements.
    """
    if not isinstance(parameter, DTensor) or not isinstance(gradient, DTensor):
        if isinstance(parameter, DTensor):
            raise RuntimeError(
                f"parameter {name!r} is a DTensor and its gradient a plain tensor, which may be the whole or a "
                f"piece: set it as DTensor.from_local(piece, parameter.device_mesh, "
                f"parameter.placements), or distribute_tensor(whole, ...)"
            )
        if isinstance(gradient, DTensor):
            raise RuntimeError(
                f"parameter {name!r} is a plain tensor and its gradient a DTensor: set it as gradient.full_tensor(), "
                f"or make the parameter a DTensor by distribute_tensor"
            )
        return gradient, None
    local = gradient.to_local()
    mesh, placements = parameter.device_mesh, tuple(gradient.placements)
    if gradient.device_mesh != mesh:
        raise RuntimeError(
            f"the gradient of {name!r} is on {gradient.device_mesh} and the parameter on {mesh}: bring it to the "
            f"parameter's mesh, or leave gradients to autograd"
        )
    if placements == parameter.placements:
        return local, None
    axes = mesh_axes(name, mesh)
    sums: dict[Axis, int] = {}  # divisor of each rank's term
    for axis, placement in zip(axes, placements, strict=True):
        if type(placement) is Partial and placement.reduce_op in ("sum", "avg"):
            sums[axis] = axis.size if placement.reduce_op == "avg" else 1
        elif not isinstance(placement, (Replicate, Shard, _StridedShard)):
            raise RuntimeError(
                f"the gradient of {name!r} is {placement} on mesh axis {axis.name!r}, which is no sum: redistribute "
                f"it to the parameter's placements {parameter.placements} before the step"
            )
    cuts = _shard_axes(f"the gradient of {name!r}", gradient.ndim, mesh, placements, axes)
    ours = _shard_axes(f"parameter {name!r}", gradient.ndim, mesh, tuple(parameter.placements), axes)
    dims = tuple(dim for dim in range(gradient.ndim) if cuts[dim] != ours[dim])
    adding = {*(axis for axis in sums if axis.size > 1), *(axis for dim in dims for axis in cuts[dim])}
    if not dims and not adding:
        return local, None
    stretches = tuple(local_slice(length, axes) for length, axes in zip(gradient.shape, cuts, strict=True))
    along = tuple(axis for axis in axes if axis in adding)
    return local, Misplaced(dims, along, prod(sums.values()), stretches, str(placements))


def _follow(placement: Placement, followers: dict[int, int]) -> Placement:
    if isinstance(placement, Replicate):
        return placement
    assert isinstance(placement, (Shard, _StridedShard))
    if placement.dim not in followers:
        return Replicate()
    dim = followers[placement.dim]
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)
