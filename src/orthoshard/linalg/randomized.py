"""Randomized Cholesky QR (Dion, arXiv 2504.05295, v3 Algorithm 5): a sketch conditions Y, Cholesky finishes it.

    R1 from the QR of S Y,   P = Y R1⁻¹,      R2 from the Cholesky factorization of PᵀP,   P <- P R2⁻¹

Y, P (b, m, r); S (k, m), entries N(0, 1/k), k = 1.25 r rounded up to a multiple of 128. S keeps lengths in the
column space of Y within a factor, so Y R1⁻¹ is well conditioned however badly Y is.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from orthoshard.linalg.columns import Floor, independent, inverse_triangle, set_aside, unit_columns


@lru_cache(maxsize=32)
def sketch(k: int, m: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """S (k, m), the same on every machine: drawn in float64 on the CPU from a generator of its own."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randn(k, m, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn / math.sqrt(k)).to(device=device, dtype=dtype)


def randomized_cholesky_qr(y: Tensor, floor: Floor = None, *, seed: int = 0) -> Tensor:
    """Orthonormal columns of ``y``: see `orthoshard.linalg.orthonormal`. One fixed sketch serves the whole batch."""
    y, noise = unit_columns(y, floor)
    b, m, r = y.shape
    if y.numel() == 0:
        return y
    k = math.ceil(1.25 * r / 128) * 128
    s = sketch(k, m, y.dtype, y.device, seed)
    sketched = torch.bmm(s.expand(b, k, m), y)
    triangle = torch.linalg.qr(sketched).R
    live = independent(triangle, noise)
    if not bool(live.all()):
        triangle = torch.linalg.qr(set_aside(sketched, live)).R
    p = torch.bmm(y * live[:, None, :], inverse_triangle(triangle))
    gram = torch.bmm(p.mT, p) + torch.diag_embed((~live).to(p.dtype))
    lower, _ = torch.linalg.cholesky_ex(gram)
    p = torch.bmm(p, inverse_triangle(lower.mT))
    sign = torch.where(triangle.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return p * sign[:, None, :]
