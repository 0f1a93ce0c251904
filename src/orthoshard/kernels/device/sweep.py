"""Accumulation and the largest entry in one sweep: see `kernels.sweep`. May import Triton and this room."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import number, rounded, unless


@triton.jit
def sweep_kernel(
    table, M, largest,
    m, n, span, tiles, spans,
    sMb, sMm, sMn, sGm, sGn,
    decay: tl.float64, skip,
    G_TYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Accumulate in one span of rows of a program (matrix, row tile, span)."""
    part = tl.program_id(0) % (tiles * spans)
    entry = table + tl.program_id(0) // (tiles * spans) * 2
    G = tl.load(entry).to(tl.pointer_type(G_TYPE))
    if ALIGNED:
        G = tl.multiple_of(G, 16)
    matrix = tl.load(entry + 1)
    rows = (part // spans * BM + tl.arange(0, BM)).to(tl.int64)
    start = part % spans * span
    M += matrix * sMb
    beta = number(decay, None, T)
    most = tl.zeros([BM, BN], T)
    for at in range(start, tl.minimum(start + span, n), BN):
        columns = (at + tl.arange(0, BN)).to(tl.int64)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        here = M + rows[:, None] * sMm + columns[None, :] * sMn
        x = tl.load(here, mask=inside, other=0.0).to(T)
        g = tl.load(G + rows[:, None] * sGm + columns[None, :] * sGn, mask=inside, other=0.0).to(T)
        x = rounded(unless(skip, beta * x + g, x), M.dtype.element_ty, None)
        tl.store(here, x, mask=inside)
        most = tl.maximum(most, tl.abs(x.to(T)), propagate_nan=tl.PropagateNan.ALL)
    lost = tl.max(tl.max((most != most).to(tl.int32), 1), 0) > 0
    value = tl.max(tl.max(most, 1), 0)
    tl.store(largest + matrix * tiles * spans + part, tl.where(lost, float("nan"), value))
