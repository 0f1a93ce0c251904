"""X = a X + b Y in place, unless a flag on the device forbids it: how state is written in a step that may be skipped.

If a gradient has one NaN, every tensor must stay as it is, and the host, which may not read the flag, has to launch the
same kernels either way. Multiplying by 0 does not work: 0 NaN = NaN. torch's fused optimizer kernels take the flag
themselves (``found_inf``, made for gradient scaling) and return before they read or write anything. Its fused SGD,

    X <- X - lr (Y + wd X),       lr = -b,  wd = (a - 1) / b,

is X = a X + b Y for all tensors of a list at once, in one sweep: 2 reads and 1 write per entry, as without the flag.
That holds for X and Y of one layout, both in float32 or both in float64. (The kernel takes bfloat16, too, but on a CPU
torch up to 2.13 then leaves X as it is, flag or not, if it has 16 entries or more.) Otherwise Y is replaced by zeros if
the flag is up, which is one more sweep over Y in its own dtype; a narrow X is computed in float32 and rounded once.

X, Y are lists of tensors of equal shapes, on one device. May import torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scalar = float | Tensor
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class FoundInf:
    """Whether this step is to change nothing, as only the device knows; 0-d. ``number``: 1 or 0 in float32, which fused
    kernels call ``found_inf``; ``flag``: the same as bool."""

    number: Tensor
    flag: Tensor

    @staticmethod
    def where(flag: Tensor) -> FoundInf:
        return FoundInf(flag.to(torch.float32), flag)


def axpby_(xs: Sequence[Tensor], ys: Sequence[Tensor], a: Scalar, b: Scalar, skip: FoundInf) -> None:
    """Write X = a X + b Y in place for each X; leave X as it is if ``skip`` is up. A tensor a must be 1 in that case,
    and costs one more sweep. b is not 0."""
    fused: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for x, y in zip(xs, ys, strict=True):
        if x.numel():
            (fused if _alike(x, y) else others).append((x, y))
    if fused:
        _fused([x for x, _ in fused], [y for _, y in fused], a, b, skip)
    for x, y in others:
        if x.dtype not in WIDE:
            x.copy_(torch.where(skip.flag, x, x.float().mul_(a).add_(y.float() * b)))
            continue
        y = torch.where(skip.flag, 0, y)
        if isinstance(a, Tensor) or a != 1:
            x.mul_(
                a if isinstance(a, Tensor) else torch.where(skip.flag, 1.0, skip.flag.new_full((), a, dtype=x.dtype))
            )
        x.add_(y * b if isinstance(b, Tensor) else y, alpha=1.0 if isinstance(b, Tensor) else b)


def _fused(xs: list[Tensor], ys: list[Tensor], a: Scalar, b: Scalar, skip: FoundInf) -> None:
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # the kernel takes (a - 1) / b as a number
        decay_(xs, a)
        ratio = 0.0
    else:
        ratio = (a - 1) / b
    torch._fused_sgd_(
        xs,
        ys,
        [],
        weight_decay=ratio,
        momentum=0.0,
        lr=kernel_number(-b, xs[0]),
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=skip.number,
    )


def lerp_(xs: Sequence[Tensor], ys: Sequence[Tensor], weight: float, skip: FoundInf | None) -> None:
    """Write X = X + weight (Y - X) in place for each X; leave X as it is if ``skip`` is up."""
    if skip is None:
        torch._foreach_lerp_(list(xs), list(ys), weight)
    else:
        axpby_(xs, ys, 1 - weight, weight, skip)


def decay_(xs: Sequence[Tensor], decay: Scalar) -> None:
    """Write X = decay X in place for each X. There is no pass at all if the host knows that decay is 1."""
    if not isinstance(decay, Tensor):
        if decay == 1:
            return
        # below float32 the CPU's foreach kernel would round decay itself: 0.998 is 0.9961 in bfloat16
        apart = [x for x in xs if x.device.type == "cpu" and x.dtype not in WIDE]
        together = [x for x in xs if x.device.type != "cpu" or x.dtype in WIDE] if apart else list(xs)
        if together:
            torch._foreach_mul_(together, decay)
        for x in apart:
            x.mul_(decay)
        return
    for dtype in {x.dtype for x in xs}:
        alike = [x for x in xs if x.dtype == dtype]
        if dtype in WIDE:  # one launch for all, which needs the 0-d tensor in their dtype
            torch._foreach_mul_(alike, decay.to(dtype))
            continue
        for x in alike:
            x.copy_(x.float().mul_(decay))


def kernel_number(value: Scalar, like: Tensor) -> Scalar:
    """Return a learning rate as torch's fused kernels take it: a number, or on CUDA a 0-d tensor in float32."""
    return value.float() if isinstance(value, Tensor) and like.device.type == "cuda" else value


def _alike(x: Tensor, y: Tensor) -> bool:
    """Return whether the fused kernel takes both. It walks through memory, so both must have
    their entries in one order."""
    dense = x.is_contiguous() or (x.ndim > 1 and x.mT.is_contiguous())
    return dense and x.dtype in WIDE and x.dtype == y.dtype and x.stride() == y.stride()
