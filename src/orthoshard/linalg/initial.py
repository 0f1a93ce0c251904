"""Initial values that do not depend on how a tensor is cut, and of which each rank draws its own piece alone.

    rows 0 ... 63 | 64 ... 127 | ...       each block of rows has a generator of its own, of seed, seed + 1, ...

Rows are counted along all dimensions but the last together. May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # rows: a rank draws at most so many more than it needs at either end of its piece


def normal_piece(shape: Sequence[int], stretches: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """The piece (offset, length) along each dimension of a tensor of this shape, standard normal, float32."""
    index = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, (offset, length) in zip(shape[:-1], stretches[:-1], strict=True):
        index = index.unsqueeze(-1) * size + torch.arange(offset, offset + length, device="cpu")
    offset, length = stretches[-1]
    numbers, counts = torch.unique_consecutive(index.flatten() // BLOCK, return_counts=True)
    drawn = [torch.empty(0, shape[-1], dtype=torch.float32, device="cpu")]
    for number, rows in zip(numbers.tolist(), index.flatten().split(counts.tolist()), strict=True):
        generator = torch.Generator("cpu").manual_seed(seed + number)
        block = torch.randn(BLOCK, shape[-1], generator=generator, dtype=torch.float32, device="cpu")
        drawn.append(block[rows - BLOCK * number])
    return torch.cat(drawn)[:, offset : offset + length].reshape(*index.shape, length)
