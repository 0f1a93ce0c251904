"""Gradient clipping that leaves a bad gradient as it is.

`clip_grad_norm_` would multiply by max_norm / nan and spread one bad entry over every gradient; the optimizer has to
see the gradients as they came, to skip the whole step. A norm may also overflow with every entry finite: then the
gradients are first divided by their largest entry, and then brought to `max_norm`, which is the same with no overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients to a common norm of at most ``max_norm`` (0: leave them). Returns the norm before."""
    held = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in held if p.grad is not None]
    if not gradients:
        return 0.0
    norm = get_total_norm(gradients)
    value = float(norm)
    if math.isfinite(value):
        if max_norm > 0:
            clip_grads_with_norm_(held, max_norm, norm)
        return value
    largest = [float(g.abs().max()) for g in gradients if g.numel()]
    if max_norm > 0 and all(map(math.isfinite, largest)):
        for gradient in gradients:
            gradient.div_(max(largest))
        rest = float(get_total_norm(gradients))  # at least 1
        for gradient in gradients:
            gradient.mul_(max_norm / rest)
    return value
