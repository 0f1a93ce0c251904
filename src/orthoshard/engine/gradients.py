"""One look at all gradients before a step: which are there, and is any of them not finite?

One number a parameter: -1 where there is no gradient, infinity where an entry is not finite, else the largest
absolute entry. The largest entry is the reduction that costs least, and one reading of one small tensor decides
the whole step. May import torch and `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import local_gradient

ABSENT = -1.0


def survey(gradients: Sequence[Tensor | None]) -> list[float]:
    """The number of each gradient, in order; read by the host once."""
    if not gradients:
        return []
    numbers: list[Tensor] = []
    for gradient in gradients:
        if gradient is None:
            numbers.append(torch.tensor(ABSENT, dtype=torch.float64))
        elif gradient.numel() == 0:
            numbers.append(torch.tensor(0.0, dtype=torch.float64))
        else:
            low, high = torch.aminmax(gradient.detach())
            numbers.append(torch.maximum(-low, high).double())
    devices = {number.device for number in numbers}
    if len(devices) > 1:
        target = max(devices, key=lambda device: device.type != "cpu")
        numbers = [number.to(target, non_blocking=True) for number in numbers]
    return torch.stack(numbers).nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()


def gradient_of(parameter: Tensor, name: str) -> Tensor | None:
    """The local piece of the parameter's gradient, never modified. Raises RuntimeError where it is sparse, or cut
    otherwise than the parameter."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse; make it dense (for an nn.Embedding: sparse=False) or leave the "
            f"parameter to another optimizer"
        )
    return local_gradient(name, parameter, gradient)
