"""Accumulation, the largest entry, and X Q in one sweep: see `kernels.sweep` for the letters.

A program owns BP rows of X and sweeps `span` of its columns. May import Triton and this room.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...linalg.scale import ORDINARY
from .common import add_dot, number, rounded

LOW, HIGH = tl.constexpr(ORDINARY[0]), tl.constexpr(ORDINARY[1])


@triton.jit
def sweep_kernel(
    table, M, Q, Y, largest,
    p, q, r, span, tiles, spans,
    sMb, sMp, sMq, sGp, sGq, sQb, sQq, sQr, sYs, sYb, sYp,
    decay: tl.float64,
    G_TYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, F_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (matrix, row tile, span). Y and Q None: no product."""
    part = tl.program_id(0) % (tiles * spans)
    entry = table + tl.program_id(0) // (tiles * spans) * 2
    G = tl.load(entry).to(tl.pointer_type(G_TYPE))
    if ALIGNED:
        G = tl.multiple_of(G, 16)
    matrix = tl.load(entry + 1)
    rows = (part // spans * BP + tl.arange(0, BP)).to(tl.int64)
    start = part % spans * span
    M += matrix * sMb
    beta = number(decay, None, T)
    most = tl.zeros([BP, BQ], T)
    ranks = tl.arange(0, BR)
    total = tl.zeros([BP, BR], T)
    for at in range(start, tl.minimum(start + span, q), BQ):
        columns = (at + tl.arange(0, BQ)).to(tl.int64)
        inside = (rows < p)[:, None] & (columns < q)[None, :]
        here = M + rows[:, None] * sMp + columns[None, :] * sMq
        m = tl.load(here, mask=inside, other=0.0).to(T)
        g = tl.load(G + rows[:, None] * sGp + columns[None, :] * sGq, mask=inside, other=0.0).to(T)
        x = rounded(beta * m + g, M.dtype.element_ty, None)
        tl.store(here, x, mask=inside)
        most = tl.maximum(most, tl.abs(x.to(T)), propagate_nan=tl.PropagateNan.ALL)
        if Q is not None:
            at_Q = Q + matrix * sQb + columns[:, None] * sQq + ranks[None, :] * sQr
            y = tl.load(at_Q, mask=(columns < q)[:, None] & (ranks < r)[None, :], other=0.0)
            total = add_dot(rounded(x, F_TYPE, None), rounded(y, F_TYPE, None), total, PRECISION)
    lost = tl.max(tl.max((most != most).to(tl.int32), 1), 0) > 0
    value = tl.max(tl.max(most, 1), 0)
    tl.store(largest + matrix * tiles * spans + part, tl.where(lost, float("nan"), value))
    if Y is not None:
        at_Y = Y + part % spans * sYs + matrix * sYb + rows[:, None] * sYp + ranks[None, :]
        y = rounded(total, Y.dtype.element_ty, None)
        tl.store(at_Y, y, mask=(rows < p)[:, None] & (ranks < r)[None, :])


@triton.jit
def settle_kernel(
    X, Q, Y, Z, a,
    p, q, r, tiles,
    sXb, sXp, sXq, sQb, sQq, sQr, sYb, sYp, sYr,
    T: tl.constexpr, F_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Z = Y / a where a is ordinary, else the product of X / a and Q anew. Program (matrix, row tile)."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    ranks = tl.arange(0, BR)
    inside = (rows < p)[:, None] & (ranks < r)[None, :]
    scale = tl.load(a + matrix).to(T)
    if (scale > LOW) & (scale < HIGH):
        total = tl.load(Y + matrix * sYb + rows[:, None] * sYp + ranks[None, :] * sYr, mask=inside, other=0.0).to(T)
        total = total / scale
    else:
        total = tl.zeros([BP, BR], T)
        for at in range(0, q, BQ):
            columns = (at + tl.arange(0, BQ)).to(tl.int64)
            here = X + matrix * sXb + rows[:, None] * sXp + columns[None, :] * sXq
            x = tl.load(here, mask=(rows < p)[:, None] & (columns < q)[None, :], other=0.0).to(T) / scale
            at_Q = Q + matrix * sQb + columns[:, None] * sQq + ranks[None, :] * sQr
            y = tl.load(at_Q, mask=(columns < q)[:, None] & (ranks < r)[None, :], other=0.0)
            total = add_dot(rounded(x, F_TYPE, None), rounded(y, F_TYPE, None), total, PRECISION)
    at_Z = Z + matrix * p * r + rows[:, None] * r + ranks[None, :]
    tl.store(at_Z, rounded(total, Z.dtype.element_ty, None), mask=inside)
