"""Factors of small Gram matrices: X upper triangular with Xᵀ G X = I, so that the columns of Y X are orthonormal.

G = YᵀY (b, r, r), X (b, r, r). For a G that may be singular see `dependent`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthoshard.linalg.columns import inverse_triangle, propagated_noise
from orthoshard.linalg.host_sync import device_type, dry_once, holds
from orthoshard.linalg.products import multiply, multiply_add

# Below this size LAPACK's Cholesky and triangular inverse beat batched products (measured: 24 to 64 are alike on CPU).
CPU_BLOCK = 32
OTHER_BLOCK = 256

# P is accepted when rounding predicts no entry of PᵀP - I above this many eps: 4e-6 in float32.
# Measured up to 1.6 times that, for shapes from (100, 16) to (16384, 48).
MAX_ORTHOGONALITY_ERROR = 32
# An entry of PᵀP - I that comes from rounding in the product P R⁻¹, in eps for each unit of ||R⁻¹e_j||; measured 0.2
# to 0.3.
APPLIED = 0.3


@dry_once
def inverse_factor(gram: Tensor, eye: Tensor | None = None, *, definite: bool = False) -> Tensor:
    """Return X = R⁻¹ for G = RᵀR, computed by halves, so that nearly all the work is batched products.

        G = [G11 G12]    X11 from G11,  B = X11ᵀ G12,  X22 from G22 - BᵀB,  X12 = -X11 B X22
            [ .  G22]

    A matrix that is not positive definite, to rounding, gives NaN, unless the caller knows that all are: ``definite``.
    No element of the batch affects another. ``eye``: I (r, r), if the caller has one.
    """
    b, r = gram.shape[:2]
    block = CPU_BLOCK if device_type(gram) == "cpu" else OTHER_BLOCK
    if r <= block:
        lower, info = torch.linalg.cholesky_ex(gram)
        x = inverse_triangle(lower.mT, eye)
        return x if definite else x.masked_fill_((info != 0).view(b, 1, 1), math.nan)
    h = -(-r // 16) * 8  # half of r, rounded up to a multiple of 8 for vector units
    x = torch.zeros_like(gram)
    first, second = (None, None) if eye is None else (eye[:h, :h], eye[h:, h:])
    x11 = x[:, :h, :h].copy_(inverse_factor(gram[:, :h, :h], first, definite=definite))
    onto = multiply(x11.mT, gram[:, :h, h:])
    left = multiply_add(gram[:, h:, h:], onto.mT, onto, alpha=-1)
    x22 = x[:, h:, h:].copy_(inverse_factor(left, second, definite=definite))
    x[:, :h, h:] = multiply(x11, multiply(onto, x22)).neg_()
    return x


def plain_factor(gram: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return X for a G whose live columns are well conditioned, and which matrices (b,) Y X makes orthonormal: at once,
    and by one more such pass. For all other matrices X is of no use. Computes in G's dtype.

    ``noise`` (b, r) is the error of the columns of Y. Reads flags.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    live = ~(squares <= noise.square())  # written like this, NaN counts as live and shows in the result
    if holds(live.all()):
        x = inverse_factor(gram)
    else:
        among = gram * (live[:, :, None] & live[:, None, :]) + torch.diag_embed((~live).to(gram.dtype))
        x = inverse_factor(among) * live[:, None, :]
    # max_j ||R⁻¹e_j||² for Y with unit columns: times eps, the error of the entries of (YX)ᵀ(YX)
    amplification = propagated_noise(x, squares.sqrt()).square().amax(1)
    eps = torch.finfo(gram.dtype).eps
    independent = (propagated_noise(x, noise) < 1).all(1)
    usable = independent & (amplification * eps * 4 * (1 + math.sqrt(x.shape[1])) < 1)  # few digits are lost
    once = usable & (amplification + APPLIED * amplification.sqrt() <= MAX_ORTHOGONALITY_ERROR)
    return x, once, usable & ~once
