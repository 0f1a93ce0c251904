"""Products that are known to be symmetric, by blocks: what lies below the diagonal is copied, not computed.

    gram              X Xᵀ                       X (b, d, D)
    symmetric_product beta C + alpha A B         A, B, C (b, d, d), symmetric; A and B commute, as polynomials of one
                                                 matrix do

With k rows of blocks (k + 1) / 2k of the multiplications are left; with the four used here 62%. On a CPU that pays from
d = 256 on in float32 and float64 (one Zen 4 core, float32, ratios of medians, alternating: squares and Grams 0.69 and
0.79 at 256, 0.67 and 0.65 at 768, 0.64 and 0.59 at 1024). It does not pay in bfloat16, whose kernels copy slices first
(0.84 and 1.29 at 768). Elsewhere it has not been measured, so products there are whole.
May import torch, `linalg.products` and `linalg.host_sync`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from orthoshard.linalg.host_sync import device_type
from orthoshard.linalg.products import multiply, multiply_add

ROWS = 4  # of blocks: six and eight took the same time to 3%
SMALLEST = 256


def by_blocks(d: int, dtype: torch.dtype, device: str) -> bool:
    """Return whether products of (d, d) results are done by blocks."""
    return device == "cpu" and dtype in (torch.float32, torch.float64) and d >= SMALLEST


def product_flops(d: int, k: int, blocks: bool) -> float:
    """Return the flops of a symmetric (d, d) product whose sum has k terms."""
    return float(sum(2 * (last - first) * (d - first) * k for first, last in _rows(d, blocks)))


def gram(X: Tensor, out: Tensor) -> Tensor:
    """Write X Xᵀ into ``out`` (b, d, d)."""
    for first, last in _rows_of(out):
        multiply(X[:, first:last], X[:, first:].mT, out[:, first:last, first:])
        _mirror(out, first, last)
    return out


def symmetric_product(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float, out: Tensor) -> Tensor:
    """Write beta C + alpha A B into ``out``, which is none of them."""
    for first, last in _rows_of(out):
        rows, right = slice(first, last), slice(first, None)
        multiply_add(C[:, rows, right], A[:, rows], B[:, :, right], beta=beta, alpha=alpha, out=out[:, rows, right])
        _mirror(out, first, last)
    return out


def _rows_of(out: Tensor) -> Iterator[tuple[int, int]]:
    d = out.shape[-1]
    return _rows(d, by_blocks(d, out.dtype, device_type(out)))


def _rows(d: int, blocks: bool) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of every row of blocks."""
    height = -(-d // ROWS) if blocks else d
    for first in range(0, d, height):
        yield first, min(first + height, d)


def _mirror(out: Tensor, first: int, last: int) -> None:
    """Copy what lies right of a diagonal block to its place below."""
    if last < out.shape[-1]:
        out[:, last:, first:last].copy_(out[:, first:last, last:].mT)
