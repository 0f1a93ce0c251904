"""Gradient clipping that leaves a bad gradient as it is, whole or sharded, and never waits for the device.

torch's `clip_grad_norm_` would multiply by max_norm / nan and so spread one bad entry over every gradient. The
optimizer must see the gradients as they came, to skip the whole step. So the factor is 1 if the norm is not finite,
which only the device finds out. Nor may a norm overflow while every entry is finite: squares are added up in float64,
in which the square of the largest float32 is finite.

Gradients of one model may be plain tensors and DTensors on several meshes. Parameters that the same mesh axes shard
form a *part*. The squared norm of its local pieces, summed over these axes, is that of the whole part; the parts then
add up. Parts are formed from the parameters, so every rank takes part in the same sums, whichever gradients it has.

If replicas have gradients G_i of their own, no rank has their mean. The norm of the mean is bounded by the mean norm,

    |1/N sum G_i|_F  <=  1/N sum |G_i|_F        (triangle inequality),

and that bound is clipped: it is exact if replicas agree, and up to sqrt(N) too large if they differ by independent
noise. May import torch, `layout`, `shield` and this room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan, prod
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Axis, group_axis, group_of, local_of, read_layout
from ..shield import shielded
from .comm import Comm
from .placing import agree_on_moves, find_gradient, moved


@shielded()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, process_group: Any = None) -> Tensor:
    """Scale all gradients, plain and sharded, in place by one factor to a norm of at most ``max_norm`` (0: leave them).

    Returns the norm before clipping, 0-d in float64 on the device of the first parameter, as
    `torch.nn.utils.clip_grad_norm_` does. Nothing waits for the device, except on ranks where a DTensor parameter has
    no gradient or one that is placed otherwise. All ranks must call this together.

    A gradient that is absent on some ranks counts as zero there. An unfinished sum (`Partial`) counts as the finished
    sum. Gradients that are not finite are left as they are, so that the optimizer skips the step. Gradients that the
    optimizer cannot take (sparse ones, a plain tensor for a DTensor) make the norm NaN, and the optimizer then reports
    why on every rank. Frozen parameters are ignored.

    Args:
        parameters: the same ones on every rank, in the same order.
        max_norm: the largest norm that is left; 0 only measures.
        process_group: replicas with gradients of their own (see `orthoshard.local_gradients`). The norm is then the
            mean of theirs, which is at least the norm of the mean gradient, and all replicas scale by the same factor.

    Raises:
        ValueError: if ``max_norm`` is below 0 or NaN; before anything is sent.
        TypeError: if anything other than parameters is given; before anything is sent.
    """
    if not isinstance(max_norm, Tensor) and not (isinstance(max_norm, Real) and max_norm >= 0):  # tensors stay unread
        raise ValueError(f"max_norm={max_norm!r} must be a number, 0 or larger; 0 only measures")
    given = [parameters] if isinstance(parameters, (Tensor, nn.Module)) else list(parameters)
    if not all(isinstance(parameter, Tensor) for parameter in given):
        raise TypeError("give parameters themselves, as model.parameters(), not a model or (name, parameter) pairs")
    members = [parameter for parameter in given if parameter.requires_grad]
    if not members:
        return torch.zeros((), dtype=torch.float64)
    replicas, comm = group_axis(group_of(process_group)), Comm()
    layouts = [read_layout(f"number {i}", parameter) for i, parameter in enumerate(members)]
    weights = [local_of(parameter) for parameter in members]
    found = [find_gradient(parameter, f"number {i}") for i, parameter in enumerate(members)]
    places = agree_on_moves(layouts, found, weights, comm)
    pieces = moved(layouts, found, places.moves, weights, comm)
    parts: dict[tuple[Axis, ...], list[int]] = {}
    for i, layout in enumerate(layouts):
        parts.setdefault(tuple(dict.fromkeys(axis for axes in layout.shard_axes for axis in axes)), []).append(i)
    squares: list[Tensor] = []
    for axes, numbers in parts.items():
        there = [piece for i in numbers if (piece := pieces[i]) is not None]
        squares.append(comm.reduced(_square(there, weights[numbers[0]].device), axes).to(weights[0].device))
    norm = torch.stack(squares).sum().sqrt()
    if any(each.refusal for each in found):
        norm.fill_(nan)
    for flag in places.flags:
        norm = torch.where(flag.to(weights[0].device), nan, norm)
    if replicas:
        norm = comm.reduced(norm / prod(axis.size for axis in replicas), replicas)
    if max_norm > 0:
        factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        gradients = [each.local for each in found if each.local is not None]
        for device, dtype in dict.fromkeys((gradient.device, gradient.dtype) for gradient in gradients):
            alike = [gradient for gradient in gradients if (gradient.device, gradient.dtype) == (device, dtype)]
            torch._foreach_mul_(alike, factor.to(device, torch.promote_types(dtype, torch.float32)))
    return norm


def _square(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the squared norm of all pieces together, 0-d in float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for kind in dict.fromkeys((piece.device, piece.dtype) for piece in pieces):
        alike = [piece for piece in pieces if (piece.device, piece.dtype) == kind]
        norms = _norms(alike)
        total += norms.square().sum().to(device)
    return total


def _norms(pieces: list[Tensor]) -> Tensor:
    """Return the norms of pieces of one device and dtype, in float64."""
    if pieces[0].device.type == "cpu":  # float64 takes three times as long here, and reading the result is free
        norms = torch.stack(torch._foreach_norm(pieces, 2, torch.promote_types(pieces[0].dtype, torch.float32)))
        if norms.isfinite().all():
            return norms.double()
    return torch.stack(torch._foreach_norm(pieces, 2, torch.promote_types(pieces[0].dtype, torch.float64)))
