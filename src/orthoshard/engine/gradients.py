"""One look at all gradients before a step: which exist, and are any of them not finite?

Each gradient becomes one number. It is infinity if an entry is not finite, or so large that a momentum of such entries
would not be finite; otherwise the largest absolute entry, which is the cheapest reduction. `largest_gradients` reads
all numbers at once, so that the host decides the whole step. `found_nonfinite` leaves them on the device, for a step
that the device itself skips. May import torch, `linalg` and `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.found_inf import FoundInf
from ..plan import TRAINABLE

ABSENT = -1.0
# As a share of the largest number: entries up to here keep momenta finite for mu up to 0.968, as 1 / (1 - 0.968) = 2^5.
ROOM = 2.0**-5


def largest_gradients(gradients: Sequence[Tensor | None]) -> list[float]:
    """Return the number of each gradient, in order, `ABSENT` for none. The host reads once per device."""
    numbers = [ABSENT if gradient is None else 0.0 for gradient in gradients]
    places: dict[torch.device, dict[int, Tensor]] = {}
    for i, gradient in enumerate(gradients):
        if gradient is not None and gradient.numel():
            places.setdefault(gradient.device, {})[i] = gradient
    for members in places.values():
        largest, limit = _largest(list(members.values()))
        for i, number in zip(members, largest.tolist(), strict=True):
            numbers[i] = number if number < limit else math.inf  # NaN too
    return numbers


def found_nonfinite(gradients: Sequence[Tensor], device: torch.device) -> FoundInf:
    """Return whether any entry of any gradient is not finite, as a flag that only the device knows."""
    there = [gradient for gradient in gradients if gradient.numel()]
    if not there:
        return FoundInf.where(torch.zeros((), dtype=torch.bool, device=device))
    largest, limit = _largest(there)
    return FoundInf.where(~(largest < limit).all())  # no NaN is less


def _largest(gradients: list[Tensor]) -> tuple[Tensor, float]:
    """Return the largest absolute entry, or NaN, of each gradient of one device, (k,), and the limit
    that it has to stay below."""
    if gradients[0].device.type == "cpu":  # torch vectorizes aminmax there
        low, high = (_stack(bounds) for bounds in zip(*map(torch.aminmax, gradients), strict=True))
        largest = torch.maximum(-low, high)
    else:  # one launch for many tensors; a NaN is passed on
        largest = _stack(torch._foreach_norm(gradients, math.inf))
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    return largest, torch.finfo(torch.float64 if wide else torch.float32).max * ROOM


def _stack(numbers: Sequence[Tensor]) -> Tensor:
    one = len({number.dtype for number in numbers}) == 1
    return torch.stack(list(numbers) if one else [number.double() for number in numbers])


def check_gradient(gradient: Tensor, parameter: Tensor, name: str) -> None:
    """Check that a gradient fits its parameter.

    Raises RuntimeError if it is sparse, of a dtype that is not in `TRAINABLE`, or left from before
    the parameter was replaced.
    """
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse; make it dense (for an nn.Embedding: sparse=False) or leave the "
            f"parameter to another optimizer"
        )
    if gradient.dtype not in TRAINABLE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRAINABLE)
        raise RuntimeError(
            f"the gradient of {name!r} is {gradient.dtype}; convert it to one of {known} before the step"
        )
    if gradient.shape != parameter.shape or gradient.device != parameter.device:
        raise RuntimeError(
            f"the gradient of {name!r} has shape {tuple(gradient.shape)} on {gradient.device}, and the parameter "
            f"{tuple(parameter.shape)} on {parameter.device}: it is from before the parameter was changed; call "
            f"optimizer.zero_grad() where you change it"
        )
