"""Columns of thin matrices (b, q, r): their squared lengths, and the same columns at length 1; and rows' lengths.

May import torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column_squares(R: Tensor) -> Tensor:
    """Squared column norms, (b, 1, r), at least in float32. ``vector_norm`` needs no copy of R, unlike R² summed."""
    wide = torch.promote_types(R.dtype, torch.float32)
    return torch.linalg.vector_norm(R, dim=-2, keepdim=True, dtype=wide).square()


def row_squares(X: Tensor) -> Tensor:
    """Squared row norms of X (b, m, n), (b, m, 1), at least in float32."""
    wide = torch.promote_types(X.dtype, torch.float32)
    return torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=wide).square()


def keep_live(V: Tensor, squares: Tensor, Q: Tensor) -> None:
    """Q = V in place, but for the columns of V that are zero: there Q keeps what it had. squares (b, 1, r): the squared
    column norms of V, 1 or 0."""
    live = squares > 0.5
    if V.device.type == "cpu" and bool(live.all()):  # on CUDA, asking would stall the device
        Q.copy_(V)
    else:
        Q.copy_(torch.where(live, V, Q))


def normalize_columns(R: Tensor, norms: Tensor, noise: float, Q: Tensor) -> Tensor:
    """Q = R / norms in place, and the same returned: R's columns at length 1.

    A column no longer than ``noise`` times the longest is rounding: it is zero in the result, and Q keeps the column
    that it had. norms (b, 1, r).
    """
    live = norms > noise * norms.amax(-1, keepdim=True)
    if R.device.type == "cpu" and R.dtype == Q.dtype and bool(live.all()):  # on CUDA, asking would stall the device
        return torch.div(R, norms, out=Q)
    unit = torch.where(live, R / norms, 0).to(Q.dtype)
    Q.copy_(torch.where(live, unit, Q))
    return unit
