"""R = S^-½ of small symmetric S >= 0, by matrix products alone.

    c = |S|_F,  Y = (S / c + e I) / (1 + e),  Z = I
    repeat  T = (3 I - Z Y) / 2,  Y <- Y T,  Z <- T Z
    R = Z / sqrt(c (1 + e))

This is the coupled Newton iteration, with Y -> sqrt and Z -> inverse sqrt. e = 1e-5 bounds R if S is nearly singular,
as in LoRA-Muon (arXiv 2606.12921). Each step multiplies the root of the smallest eigenvalue by 1.5 until it is near 1.
From sqrt(e) that takes 15 steps, and the last ones square the error. Reads nothing back. S (b, r, r). May import torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5
STEPS = 22


def inverse_root(S: Tensor) -> Tensor:
    """Return (S + e |S|_F I)^-½ of S in float64; 0 if S is 0."""
    size = torch.linalg.vector_norm(S, dim=(1, 2), keepdim=True)
    one = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    there = size > 0
    y, z = (S / torch.where(there, size, 1) + LEAST * one) / (1 + LEAST), one.expand_as(S)
    for _ in range(STEPS):
        step = 1.5 * one - 0.5 * (z @ y)
        y, z = y @ step, step @ z
    return torch.where(there, z / (size * (1 + LEAST)).sqrt(), 0)
