"""How the energy of whole matrices is spread over their singular values s1 >= s2 >= ... >= sd, d = min(m, n).

    energy      s1² + ... + sd² = |X|²
    effective   (s1² + ... + sd²)² / (s1⁴ + ... + sd⁴): how many equal singular values spread energy as widely. Hill's
                number of order 2 (Hill, Ecology 54, 1973) of the shares s²/|X|², also known as participation ratio; the
                effective rank of Roy & Vetterli (EUSIPCO 2007) is of order 1, and |X|²/s1² (stable rank) of order ∞
    share(f)    (s1² + ... + sk²) / |X|², k = ceil(f d): what the best matrix of that rank captures

The first two come from the Gram matrix of the smaller side: no singular value is computed, and nothing waits for the
device.
X (b, m, n). May import torch and `linalg.products`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthoshard.linalg.products import multiply


def spectrum(X: Tensor, fractions: Sequence[float] = ()) -> Tensor:
    """Return energy, effective rank, and the share at each of ``fractions``: (b, 2 + k) in
    float64; zeros for a zero matrix.

    Shares come from eigenvalues of the Gram matrix, right to rounding of the whole energy; on
    CUDA the host waits for them.
    """
    wide = torch.promote_types(X.dtype, torch.float32)
    energy = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64).square()
    largest = X.abs().amax((-2, -1), keepdim=True).to(wide)
    scaled = X / largest.clamp(min=torch.finfo(wide).tiny)  # squares must not overflow
    wide_side = scaled if X.shape[-2] <= X.shape[-1] else scaled.mT
    gram = multiply(wide_side, wide_side.mT).double()
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    fourth = gram.square().sum((-2, -1))
    columns = [energy, squares.square() / fourth.where(fourth > 0, 1)]
    if fractions:
        values = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)
        sums = values.cumsum(-1)
        shares = sums / sums[:, -1:].where(sums[:, -1:] > 0, 1)
        columns += [shares[:, math.ceil(fraction * values.shape[-1]) - 1] for fraction in fractions]
    return torch.stack(columns, -1)
