"""Squared lengths of columns and rows, and the columns of thin matrices (b, q, r) at length 1.

May import torch, `linalg.cpu`, `linalg.host_sync` and `linalg.found_inf`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.found_inf import FoundInf
from orthoshard.linalg.host_sync import holds, sync_is_free


def column_squares(R: Tensor) -> Tensor:
    """Return squared column norms, (b, 1, r), at least in float32. ``vector_norm`` needs no
    copy of R, unlike R² summed."""
    if R.device.type == "cpu" and R.stride(-1) < R.stride(-2) and len(R):
        return cpu.column_squares(R)
    wide = torch.promote_types(R.dtype, torch.float32)
    return torch.linalg.vector_norm(R, dim=-2, keepdim=True, dtype=wide).square()


def row_squares(X: Tensor, wide: torch.dtype | None = None) -> Tensor:
    """Return squared row norms of X (b, m, n), (b, m, 1), in ``wide``; None: at least in float32."""
    wide = wide or torch.promote_types(X.dtype, torch.float32)
    return torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=wide).square()


def unit_columns(R: Tensor, lengths: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Bring R's columns to length 1, in place, or to zero if ``lengths`` (b, 1, r) are no more than ``noise`` of the
    longest. Returns R and these lengths, which are then zero too."""
    live = lengths > noise * lengths.amax(-1, keepdim=True)
    over = torch.where(live, lengths, torch.inf)
    if R.dtype != over.dtype and R.device.type == "cpu":
        cpu.divide_columns(R, over)
    else:
        R.div_(over)
    return R, torch.where(live, lengths, 0)


def keep_live(V: Tensor, squares: Tensor, Q: Tensor, skip: FoundInf | None = None) -> None:
    """Write Q = V in place, except for columns of V that are zero: there, and if ``skip`` is up, Q keeps its old
    columns. ``squares`` (b, 1, r): above 0 if a column of V is not zero."""
    live = _taken(squares > 0, skip)
    if sync_is_free(V) and holds(live.all()):
        Q.copy_(V)
    else:
        torch.where(live, V, Q, out=Q)


def _taken(live: Tensor, skip: FoundInf | None) -> Tensor:
    return live if skip is None else live > skip.flag  # live and not skipped, in one launch
