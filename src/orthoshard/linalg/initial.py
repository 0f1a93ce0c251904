"""Initial values that do not depend on how a tensor is sharded; each rank draws only its own piece.

    rows 0 ... 63 | 64 ... 127 | ...       each block of rows has its own generator, with seed, seed + 1, ...

Rows are counted along all dimensions but the last together. May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

BLOCK = 64  # rows: a rank draws at most this many more than it needs at either end of its piece


def normal_piece(shape: Sequence[int], stretches: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Return a piece of a tensor of this shape, standard normal, float32. ``stretches``: (offset,
    length) in each dimension."""
    *ahead, (first, count), (offset, length) = stretches
    drawn, number, block = [torch.empty(0, shape[-1], dtype=torch.float32, device="cpu")], -1, torch.empty(0)
    for place in product(*(range(start, start + many) for start, many in ahead)):
        before = 0
        for size, at in zip(shape, place, strict=False):
            before = before * size + at
        row = before * shape[-2] + first
        end = row + count
        while row < end:
            if row // BLOCK != number:
                number = row // BLOCK
                generator = torch.Generator("cpu").manual_seed(seed + number)
                block = torch.randn(BLOCK, shape[-1], generator=generator, dtype=torch.float32, device="cpu")
            last = min(end, BLOCK * (number + 1))
            drawn.append(block[row - BLOCK * number : last - BLOCK * number])
            row = last
    whole = torch.cat(drawn).view(*(many for _, many in stretches[:-1]), shape[-1])
    return whole[..., offset : offset + length].contiguous()
