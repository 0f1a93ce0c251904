"""Passes that read a full-size matrix once.

    scaled_copy         a X in another dtype
    wide_row_squares    squared row norms of X in float64

X (b, m, n); a (b, 1, 1), (b, m, 1) or (b, 1, n). May import torch, `linalg` and this room.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.forms import PLAIN
from .device.common import TYPES
from .device.copy import copy_kernel, squares_kernel
from .launch import cdiv, check, launch, tile, wide


def scaled_copy(X: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Do `linalg.accumulate.scaled_copy`."""
    out = torch.empty_like(X, dtype=dtype)
    check(X, scale, out)
    if not X.numel():
        return out
    b, m, n = X.shape
    BM, BN = tile(m, 32), tile(n, 128)
    tiles = cdiv(m, BM), cdiv(n, BN)
    at = scale.expand(b, m, n)  # stride 0 along dimensions in which it does not vary
    launch(
        copy_kernel, b * tiles[0] * tiles[1],
        X, at, out, m, n, *tiles, *X.stride(), *at.stride(), *out.stride(),
        T=wide(torch.promote_types(X.dtype, scale.dtype)), BM=BM, BN=BN,
    )  # fmt: skip
    return out


def wide_row_squares(X: Tensor) -> Tensor:
    """Do `linalg.accumulate.wide_row_squares`."""
    check(X)
    if not X.numel():
        return PLAIN["wide_row_squares"](X)
    b, m, n = X.shape
    squares = X.new_empty(b, m, 1, dtype=torch.float64)
    BM = 8
    tiles = cdiv(m, BM)
    launch(
        squares_kernel, b * tiles, X, squares, m, n, tiles, *X.stride(),
        T=TYPES[torch.float64], BM=BM, BN=tile(n, 256),
    )  # fmt: skip
    return squares
