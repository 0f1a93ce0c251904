"""Nesterov's look ahead and back.

    look_ahead   N = G + decay² / (1 + decay) M, and M = decay M + G if M has a place of its own; the largest entry
                 and squared row norms of N
    look_back    M = N + (N - G) / decay, where N took the place of M

M, N (b, m, n). A program of look_ahead owns whole rows, so that their norms are sums in a fixed order; a program of
look_back owns a tile. May import torch, `linalg` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.forms import PLAIN
from ..linalg.found_inf import FoundInf
from .device.ahead import ahead_kernel, back_kernel
from .device.common import TYPES
from .launch import ALIGNED, cdiv, check, launch, number_of, tile, wide
from .table import groups


def look_ahead(
    momentum: Tensor, gradients: Sequence[Tensor], decay: float, skip: FoundInf | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do `linalg.accumulate.look_ahead`."""
    check(momentum, *gradients)
    if not momentum.numel():
        return PLAIN["look_ahead"](momentum, gradients, decay, skip)
    b, m, n = momentum.shape
    in_place = momentum.dtype in (torch.float32, torch.float64)
    N = momentum if in_place else torch.empty_like(momentum)
    BM, BN = 8, tile(n, 256 if n % ALIGNED == 0 else 128)
    tiles = cdiv(m, BM)
    largest = momentum.new_empty(b, tiles, dtype=torch.promote_types(momentum.dtype, torch.float32))
    squares = largest.new_empty(b, m, 1, dtype=torch.float64)
    for group in groups(gradients):
        launch(
            ahead_kernel, group.matrices * tiles,
            group.table, None if in_place else momentum, N, largest, squares,
            m, n, tiles,
            *momentum.stride(), *N.stride(), *group.strides,
            float(decay**2 / (1 + decay)), float(decay), number_of(skip),
            G_TYPE=TYPES[group.dtype], T=wide(momentum.dtype), ALIGNED=group.aligned, BM=BM, BN=BN,
        )  # fmt: skip
    return N, largest.amax(-1).view(-1, 1, 1).to(N.dtype), squares


def look_back(N: Sequence[Tensor], gradients: Sequence[Tensor], decay: float, skip: FoundInf | None = None) -> None:
    """Do `linalg.accumulate.look_back`."""
    check(*N, *gradients)
    if not any(block.numel() for block in N):
        return
    _, m, n = N[0].shape
    BM, BN = tile(m, 32), tile(n, 128)
    tiles = cdiv(m, BM), cdiv(n, BN)
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        pairs = [(block, gradient) for block, gradient in zip(N, gradients, strict=True) if gradient.dtype == dtype]
        for group in groups([block for block, _ in pairs], [gradient for _, gradient in pairs]):
            launch(
                back_kernel, group.matrices * tiles[0] * tiles[1],
                group.table, m, n, *tiles, *group.strides, *group.beside, float(decay),
                number_of(skip),
                N_TYPE=TYPES[group.dtype], G_TYPE=TYPES[dtype], T=wide(group.dtype), ALIGNED=group.aligned,
                BM=BM, BN=BN,
            )  # fmt: skip
