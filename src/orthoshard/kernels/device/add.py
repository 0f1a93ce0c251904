"""What is added to weights and momenta: see `kernels.add` for the letters. May import Triton and this room."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import add_dot, number, own_number, place, random_bits, rounded, unless


@triton.jit
def write(
    entry, rows, columns, inside, sWm, sWn, decay, added, skip, sUm, sUn, sCm, sCn,
    W_TYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write W = decay W + ``added`` in this tile, rounded once; by random bits if the table has them."""
    W = tl.load(entry).to(tl.pointer_type(W_TYPE))
    if ALIGNED:
        W = tl.multiple_of(W, 16)
    here = W + rows[:, None] * sWm + columns[None, :] * sWn
    w = tl.load(here, mask=inside, other=0.0).to(T)
    w = unless(skip, decay * w + added, w)
    bits = None
    if WIDTH == 4:
        bits = random_bits(entry, rows, columns, inside, sUm, sUn, sCm, sCn)
    tl.store(here, rounded(w, W_TYPE, bits), mask=inside)


@triton.jit
def add_kernel(
    table, L, R, d, N,
    m, n, r, tiles_m, tiles_n,
    sWm, sWn, sLb, sLm, sLr, sRb, sRn, sRr, sdb, sdm, sNb, sNm, sNn,
    alpha: tl.float64, alpha_at, alpha_step, decay: tl.float64, decay_at, skip,
    sUm, sUn, sCm, sCn,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Update one tile of a program (matrix, row tile, column tile). L and R None: no product; d None: N as it is."""
    count, rows, columns = place(tiles_m, tiles_n, BM, BN)
    entry = table + count * WIDTH
    matrix = tl.load(entry + 1)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    total = tl.zeros([BM, BN], T)
    if L is not None:
        for at in range(0, r, BK):
            ranks = at + tl.arange(0, BK)
            at_L = L + matrix * sLb + rows[:, None] * sLm + ranks[None, :] * sLr
            at_R = R + matrix * sRb + columns[None, :] * sRn + ranks[:, None] * sRr
            x = tl.load(at_L, mask=(rows < m)[:, None] & (ranks < r)[None, :], other=0.0)
            y = tl.load(at_R, mask=(columns < n)[None, :] & (ranks < r)[:, None], other=0.0)
            total = add_dot(rounded(x, F_TYPE, None), rounded(y, F_TYPE, None), total, PRECISION)
    o = tl.load(N + matrix * sNb + rows[:, None] * sNm + columns[None, :] * sNn, mask=inside, other=0.0).to(T)
    if d is not None:
        o *= tl.load(d + matrix * sdb + rows * sdm, mask=rows < m, other=0.0).to(T)[:, None]
    total += o
    write(
        entry, rows, columns, inside, sWm, sWn,
        number(decay, decay_at, T), own_number(alpha, alpha_at, alpha_step, matrix, T) * total,
        skip, sUm, sUn, sCm, sCn, W_TYPE, T, ALIGNED, WIDTH,
    )  # fmt: skip


@triton.jit
def add_two_kernel(
    table, M, L_M, L_W, R, a,
    m, n, r, tiles_m, tiles_n,
    sMb, sMm, sMn, sWm, sWn, sXb, sXm, sXr, sLb, sLm, sLr, sRb, sRn, sRr,
    alpha_M: tl.float64, alpha: tl.float64, alpha_at, alpha_step, decay: tl.float64, decay_at, skip,
    sUm, sUn, sCm, sCn,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, T_M: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Update one tile of a program (matrix, row tile, column tile): M += alpha_M a L_M Rᵀ and W = decay W + alpha L_W
    Rᵀ. The strides sX are those of L_M."""
    count, rows, columns = place(tiles_m, tiles_n, BM, BN)
    entry = table + count * WIDTH
    matrix = tl.load(entry + 1)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    taken = tl.zeros([BM, BN], T_M)
    added = tl.zeros([BM, BN], T)
    for at in range(0, r, BK):
        ranks = at + tl.arange(0, BK)
        left = (rows < m)[:, None] & (ranks < r)[None, :]
        at_R = R + matrix * sRb + columns[None, :] * sRn + ranks[:, None] * sRr
        y = tl.load(at_R, mask=(columns < n)[None, :] & (ranks < r)[:, None], other=0.0)
        x = tl.load(L_M + matrix * sXb + rows[:, None] * sXm + ranks[None, :] * sXr, mask=left, other=0.0)
        taken = add_dot(x, y, taken, PRECISION)
        x = tl.load(L_W + matrix * sLb + rows[:, None] * sLm + ranks[None, :] * sLr, mask=left, other=0.0)
        added = add_dot(rounded(x, F_TYPE, None), rounded(y, F_TYPE, None), added, PRECISION)
    scale = number(alpha_M, None, T_M)
    if a is not None:
        scale *= tl.load(a + matrix).to(T_M)
    here = M + matrix * sMb + rows[:, None] * sMm + columns[None, :] * sMn
    x = tl.load(here, mask=inside, other=0.0).to(T_M)
    x = unless(skip, x + scale * taken, x)
    tl.store(here, rounded(x, M.dtype.element_ty, None), mask=inside)
    write(
        entry, rows, columns, inside, sWm, sWn,
        number(decay, decay_at, T), own_number(alpha, alpha_at, alpha_step, matrix, T) * added,
        skip, sUm, sUn, sCm, sCn, W_TYPE, T, ALIGNED, WIDTH,
    )  # fmt: skip
