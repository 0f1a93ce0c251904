"""Gradient clipping that leaves a bad gradient as it is, whole or cut.

`clip_grad_norm_` would multiply by max_norm / nan and spread one bad entry over every gradient; the optimizer has to
see the gradients as they came, to skip the whole step. A norm may also overflow with every entry finite: then the
gradients are first divided by their largest entry, and then brought to `max_norm`, which is the same with no overflow.

Gradients of one model may be plain tensors and DTensors on several meshes. Those that the same mesh axes cut are a
*part*: the squared norm of its local pieces, summed over these axes, is that of the whole; parts then add up.

Where replicas have gradients G_i of their own, nobody has their mean. Its norm is bounded by the mean of theirs,

    |1/N sum G_i|_F  <=  1/N sum |G_i|_F        (triangle inequality),

which is what is clipped: equal where replicas agree, larger by up to sqrt(N) where they differ by independent noise.
May import torch, `layout` and `comm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..layout import Axis, group_axis, group_of, local_of, read_layout
from .comm import Comm

Parts = dict[tuple[Axis, ...], list[Tensor]]


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, process_group: Any = None) -> float:
    """Scale all gradients, plain and cut, in place by one factor to a norm of at most ``max_norm`` (0: leave them).

    Returns the norm before. ``process_group``: replicas with gradients of their own (see
    `orthoshard.local_gradients`); the norm is then the mean of theirs, no less than that of the mean gradient, and all
    scale alike. Gradients that are not finite are left as they are, for the optimizer to skip the step.
    """
    replicas = group_axis(group_of(process_group))
    parts = _parts(p.grad for p in parameters if p.grad is not None)
    gradients = [gradient for part in parts.values() for gradient in part]
    if not parts:
        return 0.0
    norm = _norm(parts, replicas)
    value = float(norm)
    if math.isfinite(value):
        if max_norm > 0 and gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return value
    largest = float(_over(_finish(parts, _largest, "max").max(), replicas, "max"))
    if max_norm > 0 and math.isfinite(largest):
        for gradient in gradients:
            gradient.div_(largest)
        rest = float(_norm(parts, replicas))  # at least 1 / replicas
        for gradient in gradients:
            gradient.mul_(max_norm / rest)
    return value


def _parts(gradients: Iterable[Tensor]) -> Parts:
    """Local pieces by the axes that cut them; in the same order on every rank."""
    parts: Parts = {}
    for gradient in gradients:
        cuts = read_layout("a gradient", gradient).cuts
        part = parts.setdefault(tuple(dict.fromkeys(axis for axes in cuts for axis in axes)), [])
        part.append(local_of(gradient))
    return parts


def _norm(parts: Parts, replicas: tuple[Axis, ...]) -> Tensor:
    if list(parts) == [()]:
        norm = get_total_norm(parts[()])
    else:  # in float64 the square of a finite norm is finite
        squares = _finish(parts, lambda part: get_total_norm(part).double().square(), "sum")
        norm = squares.sum().sqrt().float()
    return _over(norm / prod(axis.size for axis in replicas), replicas, "sum") if replicas else norm


def _finish(parts: Parts, of: Callable[[list[Tensor]], Tensor], op: str) -> Tensor:
    """``of`` each part, finished over the axes that cut it."""
    found: list[Tensor] = []
    for axes, part in parts.items():
        found.append(_over(of(part), axes, op))
    return torch.stack(found)


def _over(value: Tensor, axes: tuple[Axis, ...], op: str) -> Tensor:
    for axis in axes:
        Comm().all_reduce(value, axis, op).wait()
    return value


def _largest(part: list[Tensor]) -> Tensor:
    """The largest absolute entry; infinite where one is not finite (a maximum over ranks may lose a NaN)."""
    zero = torch.zeros((), dtype=torch.float64, device=part[0].device)
    largest = torch.stack([zero, *(piece.abs().max().double() for piece in part if piece.numel())]).max()
    return largest.nan_to_num(nan=math.inf, posinf=math.inf)
