"""Nesterov's look ahead and back: see `kernels.ahead` for the letters. May import Triton and this room."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import number, place, rounded, unless


@triton.jit
def ahead_kernel(
    table, M, N, largest, squares,
    m, n, tiles,
    sMb, sMm, sMn, sNb, sNm, sNn, sGm, sGn,
    ahead: tl.float64, decay: tl.float64, skip,
    G_TYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Look ahead in the rows of a program (matrix, row tile). M None: N takes its place."""
    part = tl.program_id(0) % tiles
    entry = table + tl.program_id(0) // tiles * 2
    G = tl.load(entry).to(tl.pointer_type(G_TYPE))
    if ALIGNED:
        G = tl.multiple_of(G, 16)
    matrix = tl.load(entry + 1)
    rows = (part * BM + tl.arange(0, BM)).to(tl.int64)
    alpha = number(ahead, None, T)
    most = tl.zeros([BM, BN], T)
    total = tl.zeros([BM], tl.float64)
    for at in range(0, n, BN):
        columns = (at + tl.arange(0, BN)).to(tl.int64)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        g = tl.load(G + rows[:, None] * sGm + columns[None, :] * sGn, mask=inside, other=0.0).to(T)
        here = N + matrix * sNb + rows[:, None] * sNm + columns[None, :] * sNn
        if M is None:
            y = tl.load(here, mask=inside, other=0.0).to(T)
        else:
            there = M + matrix * sMb + rows[:, None] * sMm + columns[None, :] * sMn
            y = tl.load(there, mask=inside, other=0.0).to(T)
            x = unless(skip, number(decay, None, T) * y + g, y)
            tl.store(there, rounded(x, M.dtype.element_ty, None), mask=inside)
        x = rounded(unless(skip, alpha * y + g, y), N.dtype.element_ty, None)
        tl.store(here, x, mask=inside)
        most = tl.maximum(most, tl.abs(x.to(T)), propagate_nan=tl.PropagateNan.ALL)
        total += tl.sum(x.to(tl.float64) * x.to(tl.float64), 1)
    lost = tl.max(tl.max((most != most).to(tl.int32), 1), 0) > 0
    value = tl.max(tl.max(most, 1), 0)
    tl.store(largest + matrix * tiles + part, tl.where(lost, float("nan"), value))
    tl.store(squares + matrix * m + rows, total, mask=rows < m)


@triton.jit
def back_kernel(
    table, m, n, tiles_m, tiles_n, sNm, sNn, sGm, sGn,
    decay: tl.float64, skip,
    N_TYPE: tl.constexpr, G_TYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Look back in the tile of a program (matrix, row tile, column tile)."""
    count, rows, columns = place(tiles_m, tiles_n, BM, BN)
    entry = table + count * 3
    N = tl.load(entry).to(tl.pointer_type(N_TYPE))
    G = tl.load(entry + 2).to(tl.pointer_type(G_TYPE))
    if ALIGNED:
        N = tl.multiple_of(N, 16)
        G = tl.multiple_of(G, 16)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    here = N + rows[:, None] * sNm + columns[None, :] * sNn
    x = tl.load(here, mask=inside, other=0.0).to(T)
    g = tl.load(G + rows[:, None] * sGm + columns[None, :] * sGn, mask=inside, other=0.0).to(T)
    x = unless(skip, x + (x - g) / number(decay, None, T), x)
    tl.store(here, rounded(x, N_TYPE, None), mask=inside)
