"""Accumulation, with what can be had of the momentum while it is in registers.

    accumulate                M = decay M + G, and the largest entry of each matrix
    accumulate_and_multiply   the same, and Y = X Q for X = M or Mᵀ, in the same sweep
    first_product             Y = (X / a) Q, from that Y where no size needs care

X (b, p, q) is M or Mᵀ, G alike, Q (b, q, r), Y (b, p, r), a (b, 1, 1) powers of two or None.
Long rows are cut into spans; Y over several spans is summed afterwards, in a fixed order. There are no atomics, so that
results are the same bits each time. May import torch, `linalg` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.forms import PLAIN
from ..linalg.products import Precision
from .device.common import TYPES
from .device.sweep import settle_kernel, sweep_kernel
from .launch import cdiv, check, dot, launch, operands, tile, wide
from .table import groups

# Above this rank the product is so much arithmetic (2 r flops for the 4 bytes of an entry) that a second read of M does
# not show, and its sums no longer fit into registers: torch's product then follows the accumulation.
WIDEST = 128
# Programs in all below which long rows are cut into spans, so that a GPU of up to 150 multiprocessors has work.
PROGRAMS = 512
LEAST_SPAN = 256  # columns: shorter ones would spend more on writing and summing their Y


def accumulate(momentum: Tensor, gradients: Sequence[Tensor], decay: float = 1.0) -> Tensor:
    """As `linalg.accumulate.accumulate`."""
    return _accumulate(momentum, gradients, decay, None, None)[0]


def accumulate_and_multiply(
    momentum: Tensor,
    gradients: Sequence[Tensor],
    decay: float,
    Q: Tensor,
    transposed: bool,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `linalg.accumulate.accumulate_and_multiply`. Up to `WIDEST` with the product."""
    if Q.shape[2] > WIDEST:
        return accumulate(momentum, gradients, decay), None
    if transposed:
        momentum, gradients = momentum.mT, [gradient.mT for gradient in gradients]
    return _accumulate(momentum, gradients, decay, Q, precision)


def _accumulate(
    X: Tensor, gradients: Sequence[Tensor], decay: float, Q: Tensor | None, precision: Precision | None
) -> tuple[Tensor, Tensor | None]:
    check(X, *gradients, *(() if Q is None else (Q,)))
    b, p, q = X.shape
    if not X.numel() or (Q is not None and not Q.numel()):
        plain = PLAIN["accumulate"](X, gradients, decay)
        return plain, None if Q is None else X.new_zeros(b, p, Q.shape[2])
    T = wide(X.dtype)
    BP, BQ, BR = _tiles(X, 0 if Q is None else Q.shape[2])
    tiles = cdiv(p, BP)
    span = max(LEAST_SPAN, cdiv(q, cdiv(PROGRAMS, b * tiles))) if Q is not None else LEAST_SPAN * 4
    span = cdiv(span, BQ) * BQ
    spans = cdiv(q, span)
    largest = X.new_empty(b, tiles * spans, dtype=torch.promote_types(X.dtype, torch.float32))
    parts = None
    if Q is not None:
        parts = X.new_empty(spans, b, p, Q.shape[2], dtype=X.dtype if spans == 1 else largest.dtype)
    for group in groups(gradients):
        launch(
            sweep_kernel, group.matrices * tiles * spans,
            group.table, X, Q, parts, largest,
            p, q, 0 if Q is None else Q.shape[2], span, tiles, spans,
            *X.stride(), *group.strides,
            *((0, 0, 0) if Q is None else Q.stride()),
            *((0, 0, 0) if parts is None else parts.stride()[:3]),
            float(decay),
            G_TYPE=TYPES[group.dtype], T=T, ALIGNED=group.aligned,
            F_TYPE=operands(X.dtype, precision), PRECISION=dot(precision), BP=BP, BQ=BQ, BR=BR,
        )  # fmt: skip
    found = largest.amax(-1).view(-1, 1, 1).to(X.dtype)
    if parts is None:
        return found, None
    return found, parts[0] if spans == 1 else parts.sum(0).to(X.dtype)


def first_product(
    X: Tensor, Q: Tensor, a: Tensor | None, Y: Tensor | None, precision: Precision | None = None
) -> Tensor:
    """As `linalg.accumulate.first_product`."""
    if Y is None or a is None or not Y.numel():
        return PLAIN["first_product"](X, Q, a, Y, precision)
    check(X, Q, a, Y)
    b, p, q = X.shape
    r = Q.shape[2]
    BP, BQ, BR = _tiles(X, r)
    tiles = cdiv(p, BP)
    Z = X.new_empty(b, p, r)
    launch(
        settle_kernel, b * tiles,
        X, Q, Y, Z, a.reshape(-1).contiguous(),
        p, q, r, tiles,
        *X.stride(), *Q.stride(), *Y.stride(),
        T=wide(X.dtype), F_TYPE=operands(X.dtype, precision), PRECISION=dot(precision), BP=BP, BQ=BQ, BR=BR,
    )  # fmt: skip
    return Z


def _tiles(X: Tensor, r: int) -> tuple[int, int, int]:
    """BP, BQ, BR: rows and columns of a tile of X, and the rank or, without a product, the least. 4 warps hold 64 x 128
    sums of float32 in 64 registers a thread."""
    if r:
        return 32 if X.dtype == torch.float64 else 64, 32, tile(r, WIDEST)
    return (16, 128, 16) if X.stride(2) == 1 else (128, 16, 16)
