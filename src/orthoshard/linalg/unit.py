"""Columns of thin matrices (b, q, r): their squared lengths, and the same columns at length 1; and rows' lengths.

May import torch, `linalg.cpu`, `linalg.host_sync` and `linalg.found_inf`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.found_inf import FoundInf
from orthoshard.linalg.host_sync import holds, sync_is_free


def column_squares(R: Tensor) -> Tensor:
    """Squared column norms, (b, 1, r), at least in float32. ``vector_norm`` needs no copy of R, unlike R² summed."""
    if R.device.type == "cpu" and R.stride(-1) < R.stride(-2) and len(R):
        return cpu.column_squares(R)
    wide = torch.promote_types(R.dtype, torch.float32)
    return torch.linalg.vector_norm(R, dim=-2, keepdim=True, dtype=wide).square()


def row_squares(X: Tensor, wide: torch.dtype | None = None) -> Tensor:
    """Squared row norms of X (b, m, n), (b, m, 1), in ``wide``; None: at least in float32."""
    wide = wide or torch.promote_types(X.dtype, torch.float32)
    return torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=wide).square()


def unit_columns(R: Tensor, lengths: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """R's columns at length 1, in place; zero where ``lengths`` (b, 1, r) are no more than ``noise`` of the longest.
    And these lengths, zero there too."""
    live = lengths > noise * lengths.amax(-1, keepdim=True)
    over = torch.where(live, lengths, torch.inf)
    if R.dtype != over.dtype and R.device.type == "cpu":
        cpu.divide_columns(R, over)
    else:
        R.div_(over)
    return R, torch.where(live, lengths, 0)


def keep_live(V: Tensor, squares: Tensor, Q: Tensor, skip: FoundInf | None = None) -> None:
    """Q = V in place, but for the columns of V that are zero: there, and where ``skip``, Q keeps what it had.
    squares (b, 1, r): above 0 where a column of V is not zero."""
    live = _taken(squares > 0, skip)
    if sync_is_free(V) and holds(live.all()):
        Q.copy_(V)
    else:
        torch.where(live, V, Q, out=Q)


def _taken(live: Tensor, skip: FoundInf | None) -> Tensor:
    return live if skip is None else live > skip.flag  # live and not the flag, in one launch
