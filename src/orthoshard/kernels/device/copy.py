"""Copies and sums of squares: see `kernels.copy`. May import Triton and this room."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import place, rounded


@triton.jit
def copy_kernel(
    X, a, out, m, n, tiles_m, tiles_n, sXb, sXm, sXn, sab, sam, san, sOb, sOm, sOn,
    T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Copy the tile of a program (matrix, row tile, column tile)."""
    count, rows, columns = place(tiles_m, tiles_n, BM, BN)
    matrix, rows, columns = count.to(tl.int64), rows[:, None], columns[None, :]
    inside = (rows < m) & (columns < n)
    x = tl.load(X + matrix * sXb + rows * sXm + columns * sXn, mask=inside, other=0.0).to(T)
    x *= tl.load(a + matrix * sab + rows * sam + columns * san, mask=inside, other=0.0).to(T)
    here = out + matrix * sOb + rows * sOm + columns * sOn
    tl.store(here, rounded(x, out.dtype.element_ty, None), mask=inside)


@triton.jit
def squares_kernel(
    X, squares, m, n, tiles, sXb, sXm, sXn, T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sum the squares of the rows of a program (matrix, row tile)."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles * BM + tl.arange(0, BM)).to(tl.int64)
    total = tl.zeros([BM], T)
    for at in range(0, n, BN):
        columns = (at + tl.arange(0, BN)).to(tl.int64)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        here = X + matrix * sXb + rows[:, None] * sXm + columns[None, :] * sXn
        x = tl.load(here, mask=inside, other=0.0).to(T)
        total += tl.sum(x * x, 1)
    tl.store(squares + matrix * m + rows, total, mask=rows < m)
