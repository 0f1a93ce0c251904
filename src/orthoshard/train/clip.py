"""Gradient clipping that leaves a bad gradient as it is, whole or cut.

`clip_grad_norm_` would multiply by max_norm / nan and spread one bad entry over every gradient; the optimizer has to
see the gradients as they came, to skip the whole step. A norm may also overflow with every entry finite: then the
gradients are first divided by their largest entry, and then brought to `max_norm`, which is the same with no overflow.

Gradients of one model may be plain tensors and DTensors on several meshes. Those that the same mesh axes cut are a
*part*: the squared norm of its local pieces, summed over these axes, is that of the whole; parts then add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from orthoshard.layout import Axis, local_of, read_layout

Parts = dict[tuple[Axis, ...], list[Tensor]]


def clip_(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients to a common norm of at most ``max_norm`` (0: leave them). Returns the norm before."""
    parts = _parts(p.grad for p in parameters if p.grad is not None)
    gradients = [gradient for part in parts.values() for gradient in part]
    if not parts:
        return 0.0
    norm = _norm(parts)
    value = float(norm)
    if math.isfinite(value):
        if max_norm > 0 and gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return value
    largest = float(_finish(parts, _largest, dist.ReduceOp.MAX).max())
    if max_norm > 0 and math.isfinite(largest):
        for gradient in gradients:
            gradient.div_(largest)
        rest = float(_norm(parts))  # at least 1
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


def _norm(parts: Parts) -> Tensor:
    if list(parts) == [()]:
        return get_total_norm(parts[()])
    # In float64 the square of a finite norm is finite.
    squares = _finish(parts, lambda part: get_total_norm(part).double().square(), dist.ReduceOp.SUM)
    return squares.sum().sqrt().float()


def _finish(parts: Parts, of: Callable[[list[Tensor]], Tensor], op: dist.ReduceOp.RedOpType) -> Tensor:
    """``of`` each part, finished over the axes that cut it."""
    found: list[Tensor] = []
    for axes, part in parts.items():
        value = of(part)
        for axis in axes:
            dist.all_reduce(value, op, group=axis.group)
        found.append(value)
    return torch.stack(found)


def _largest(part: list[Tensor]) -> Tensor:
    """The largest absolute entry; infinite where one is not finite (a maximum over ranks may lose a NaN)."""
    zero = torch.zeros((), dtype=torch.float64, device=part[0].device)
    largest = torch.stack([zero, *(piece.abs().max().double() for piece in part if piece.numel())]).max()
    return largest.nan_to_num(nan=math.inf, posinf=math.inf)
