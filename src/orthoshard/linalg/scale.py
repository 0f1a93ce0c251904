"""The size of each matrix of a batch, and an exact scale that brings it to about 1.

    largest(X) = max |X_ij|            power_of_two(a) = 2^k,  a / 2^k in [1/2, 1)

Dividing by a power of two rounds nothing, so what is computed afterwards does not depend on the size of the input.
May import torch, `linalg.cpu`, `linalg.host_sync` and `linalg.found_inf`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.found_inf import FoundInf
from orthoshard.linalg.host_sync import holds, sync_is_free


def largest(x: Tensor) -> Tensor:
    """Return the largest absolute entry of each matrix of ``x`` (b, m, n), as (b, 1, 1). NaN if the matrix has one."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], 1, 1)
    if x.device.type == "cpu":
        return cpu.largest(x)
    return torch.linalg.vector_norm(x, math.inf, dim=(1, 2), keepdim=True)


def power_of_two(a: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a power of two s for each a >= 0 with a / s in [1/2, 1); s = 1 if a is 0 or not finite.

    The exponent is clamped so that both s and 1 / s are normal numbers of ``dtype``, which is no wider than a's; None:
    that of a. Denormal a are then scaled up only as far as a normal s allows.
    """
    dtype = dtype or a.dtype
    widest = -int(math.log2(torch.finfo(dtype).tiny))  # 126 in float32: 2^126 and 2^-126 are both normal
    # A number divided by its mantissa is exactly a power of two; 0, infinity and NaN become NaN.
    power = torch.div(a, torch.frexp(a).mantissa)
    return power.nan_to_num_(nan=1.0).clamp_(2.0**-widest, 2.0**widest).to(dtype)


# Between these sizes no product with fewer than 2^40 terms over- or underflows in float32 or bfloat16.
ORDINARY = (2.0**-40, 2.0**40)


def scale_where_needed(largest: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return powers of two for matrices whose largest entries are ``largest`` (b, 1, 1), or None if none is needed.

    If reading is free, the sizes are read, and matrices are left alone while these are ordinary: dividing would change
    no bit and cost a pass. Otherwise scales are always returned.
    """
    if sync_is_free(largest):
        low, high = ORDINARY
        if holds((((largest > low) & (largest < high)) | (largest == 0)).all()):
            return None
    return power_of_two(largest, dtype)


def scaled(P: Tensor, a: Tensor | None, skip: FoundInf | None = None) -> Tensor:
    """Multiply P (b, p, r) by scales a (b, 1, 1), None for 1; by zero if ``skip`` is up, without another pass."""
    if skip is not None:
        a = torch.where(skip.flag, 0, P.new_ones(1, 1, 1) if a is None else a)
    return P if a is None else P * a
