"""The polar factor U Vᵀ of X = U diag(s) Vᵀ by odd polynomials: matrix products alone, no decomposition.

    X <- X / ||X||_F,  then for each (a, b, c):   X <- a X + (b A + c A²) X,   A = X Xᵀ

which maps each singular value s to a s + b s³ + c s⁵ and leaves U and V alone (Newton-Schulz; Muon, K. Jordan 2024).
A is taken on the smaller side: X is (b, m, n) with m <= n after a transposition. May import linalg.scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orthoshard.linalg.polar_express import Triple, polar_express
from orthoshard.linalg.scale import largest, power_of_two


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One (a, b, c) for each step, and where they come from."""

    steps: tuple[Triple, ...]
    source: str


POLAR: dict[str, Coefficients] = {
    # Steep at 0 and deliberately not convergent: singular values in [0.003, 1] end in [0.68, 1.21].
    "jordan": Coefficients(
        ((3.4445, -4.7750, 2.0315),) * 5,
        "K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024",
    ),
    # Singular values in [0.003, 1] end in [0.87, 1.13], those at 0.001 above 0.85.
    "polar_express": Coefficients(
        polar_express(lower=1e-3, steps=5, safety=1.01),
        "Amsel, Persson, Musco, Gower, The Polar Express, arXiv 2505.16932, 2025; safety factor 1.01",
    ),
}


def polar(x: Tensor, coefficients: Coefficients, dtype: torch.dtype | None = None) -> Tensor:
    """The approximate polar factor of each matrix of ``x`` (b, m, n), in ``x``'s shape and dtype.

    ``dtype`` is what the iteration computes in (bfloat16 suffices for Muon); None: ``x``'s own. The size of ``x``
    does not matter, from denormal to the largest number of its dtype; a zero matrix gives zero.
    """
    b, m, n = x.shape
    result_dtype = x.dtype
    if x.numel() == 0:
        return torch.zeros_like(x)
    size = largest(x)
    # At least float32 for the norm; the division makes the copy that the iteration may then overwrite.
    x = x.to(torch.promote_types(x.dtype, torch.float32)) / power_of_two(size)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x.mul_(torch.where(norm > 0, 1 / norm, 0)).to(dtype or result_dtype)
    if m > n:
        x = x.mT.contiguous()  # bfloat16 on a CPU has no fast kernel for products into a transposed tensor
    small = min(m, n)
    a_matrix = x.new_empty(b, small, small)
    polynomial = torch.empty_like(a_matrix)
    spare = torch.empty_like(x)
    for a, b_, c in coefficients.steps:
        torch.bmm(x, x.mT, out=a_matrix)
        torch.baddbmm(a_matrix, a_matrix, a_matrix, beta=b_, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=spare)
        x, spare = spare, x
    return (x.mT if m > n else x).to(result_dtype)
