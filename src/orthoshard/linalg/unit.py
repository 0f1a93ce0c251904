"""Columns of thin matrices (b, q, r): their squared lengths, and the same columns at length 1; and rows' lengths.

May import torch, `linalg.looking` and `linalg.guarded`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.guarded import Skip
from orthoshard.linalg.looking import may_look


def column_squares(R: Tensor) -> Tensor:
    """Squared column norms, (b, 1, r), at least in float32. ``vector_norm`` needs no copy of R, unlike R² summed; but
    on a CPU it goes down columns entry by entry, and takes 3 to 8 times as long as squares of a matrix that stays in
    the cache (12 of 3072 x 192: 17 ms against 2 to 6; one core)."""
    wide = torch.promote_types(R.dtype, torch.float32)
    if R.device.type == "cpu" and R.stride(-1) < R.stride(-2) and len(R):
        return torch.stack([matrix.to(wide).square().sum(0, keepdim=True) for matrix in R])
    return torch.linalg.vector_norm(R, dim=-2, keepdim=True, dtype=wide).square()


def row_squares(X: Tensor) -> Tensor:
    """Squared row norms of X (b, m, n), (b, m, 1), at least in float32."""
    wide = torch.promote_types(X.dtype, torch.float32)
    return torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=wide).square()


def keep_live(V: Tensor, squares: Tensor, Q: Tensor, skip: Skip | None = None) -> None:
    """Q = V in place, but for the columns of V that are zero: there, and where ``skip``, Q keeps what it had.
    squares (b, 1, r): the squared column norms of V, 1 or 0."""
    live = _taken(squares > 0.5, skip)
    if may_look(V) and bool(live.all()):
        Q.copy_(V)
    else:
        torch.where(live, V, Q, out=Q)


def normalize_columns(R: Tensor, norms: Tensor, noise: float, Q: Tensor, skip: Skip | None = None) -> Tensor:
    """Q = R / norms in place, and the same returned: R's columns at length 1.

    A column no longer than ``noise`` times the longest is rounding: it is zero in the result, and Q keeps the column
    that it had; where ``skip``, all of it. norms (b, 1, r).
    """
    live = norms > noise * norms.amax(-1, keepdim=True)
    if may_look(R) and bool(live.all()):
        if R.dtype == Q.dtype == norms.dtype:
            return torch.div(R, norms, out=Q)
        for q, narrow, lengths in zip(Q, R, norms, strict=True):  # dtype by dtype: a CPU mixes them entry by entry
            q.copy_(narrow.to(norms.dtype) / lengths)
        return Q
    unit = torch.where(live, R / norms, 0).to(Q.dtype)
    torch.where(_taken(live, skip), unit, Q, out=Q)
    return unit


def _taken(live: Tensor, skip: Skip | None) -> Tensor:
    return live if skip is None else live > skip.flag  # live and not the flag, in one launch
