"""Matrices in 8 bits: linear, with a scale for each block of up to 2048 entries of a row (8-bit Muon, 2509.23106).

    s = |block|_max / 127, rounded to bfloat16;      q = round(x / s), in [-127, 127];      x ~ s q

Blocks are cut out of the rows of the whole matrix, at columns 0, 2048, 4096, ... A matrix that is sharded by rows has
whole blocks on each rank. One that is sharded by columns needs the maxima of other ranks, one number per block, but
none of their entries. The largest q of a block is 127 and s has 8 bits, so that 127 s is exact and gives s again:
decoding and encoding again changes no bit. Blocks below about 1e-36 are zero.

x (b, m, n') and q are pieces of whole (b, m, n) from column ``first`` on; s (b, m, ceil(n / 2048)) is that of all
blocks. May import torch and `linalg.cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from orthoshard.linalg import cpu

BLOCK = 2048
SCALE = torch.bfloat16
LEVELS = 127
LEAST = torch.finfo(torch.float32).tiny
# Entries that are converted at a time on a CPU: they stay in the second-level cache for the four passes.
CHUNK = 2**17


def blocks_of(columns: int) -> int:
    """Return how many blocks a row of this many columns has."""
    return -(-columns // BLOCK)


def largest_of_blocks(x: Tensor, columns: int, first: int) -> Tensor:
    """Return the largest absolute entry of each block, as far as it is here, (b, m, k), of
    matrices with ``columns`` columns."""
    found = x.new_zeros(*x.shape[:2], blocks_of(columns))
    for piece, out in _pieces([x], [found], first):
        torch.maximum(piece.amax(-1, keepdim=True), -piece.amin(-1, keepdim=True), out=out)
    return found


def scales(largest: Tensor) -> Tensor:
    """Return the scale of each block; 0 if the block counts as zero."""
    scale = (largest / LEVELS).clamp_(max=torch.finfo(SCALE).max).to(SCALE)
    return torch.where(scale >= LEAST, scale, 0)


def encode_(q: Tensor, x: Tensor, scale: Tensor, first: int) -> None:
    """Write q = round(x / s). x is overwritten."""
    inverse = torch.where(scale > 0, 1 / scale.to(x.dtype), 0)
    for out, piece, by in _pieces([q, x], [inverse], first):
        piece.mul_(by).round_()
        # float64 entries may be larger than any scale allows
        out.copy_(piece.clamp_(-LEVELS, LEVELS) if x.dtype == torch.float64 else piece)


def decode(q: Tensor, scale: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Return s q as a new tensor."""
    x, scale = torch.empty_like(q, dtype=dtype), scale.to(dtype)
    for out, piece, by in _pieces([x, q], [scale], first):
        if x.device.type == "cpu":  # a product of two dtypes makes a copy first there
            out.copy_(piece).mul_(by)
        else:
            torch.mul(piece, by, out=out)
    return x


def _pieces(of_entries: list[Tensor], of_blocks: list[Tensor], first: int) -> Iterator[list[Tensor]]:
    """Yield views (..., blocks, width) of tensors with one number per entry, and (..., blocks, 1) of tensors with one
    per block: first what the cut leaves of a block, then whole blocks, then the rest; on a CPU a few rows at a time."""
    columns, start = of_entries[0].shape[-1], 0
    while start < columns and of_entries[0].numel():
        block, inside = divmod(first + start, BLOCK)
        whole = 0 if inside else (columns - start) // BLOCK
        count, width = (whole, BLOCK) if whole else (1, min(BLOCK - inside, columns - start))
        views = [x[..., start : start + count * width].unflatten(-1, (count, width)) for x in of_entries]
        views += [x[..., block : block + count].unsqueeze(-1) for x in of_blocks]
        start += count * width
        yield from cpu.pieces(views, CHUNK) if views[0].device.type == "cpu" else (views,)
