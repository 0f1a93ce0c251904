"""The one place where weights of matrices are written: W = decay W - size U,  U = L Rᵀ + diag(d) X.

Decay, cautious masks, narrow dtypes and stochastic rounding are here, once, for every direction. U is formed only if
the mathematics needs its entries (cautious decay), and then a piece at a time. May import torch, `linalg` and this
room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.accumulate import (
    Product,
    add_product,
    add_product_and_rows,
    add_products,
    add_scaled,
    blocks,
    take_product,
)
from ..linalg.found_inf import WIDE, FoundInf
from ..linalg.products import Precision, Scalar, multiply, multiply_add
from ..linalg.rounding import Rounding
from .stage import Move

# Entries of U that are formed at a time on a CPU: with W and a mask they stay in the third-level cache, and two threads
# have enough to do. DionTail 1/4 with nanochat's stages, gpt2-small, takes 1.07 of the plain step, 1.09 with 2^21, and
# 1.15 or more with 2^17 (2 cores of a Zen 4).
FORMED = 2**19


@dataclass
class Applied:
    """U as it is written, local pieces of b matrices: L (b, m, r), R (b, n, r), d (b, m, 1), X (b, m, n)."""

    left: Tensor | None
    right: Tensor | None
    rows: Tensor | None
    full: Tensor | None


def write(
    weights: Sequence[Tensor],
    update: Applied,
    move: Move,
    *,
    taken: tuple[Tensor, Product] | None = None,
    precision: Precision | None = None,
    rounding: Sequence[Rounding] | None = None,
    skip: FoundInf | None = None,
    settle: Callable[[slice], None] | None = None,
) -> None:
    """Write all weights, and take ``taken`` out of the momentum, in as few sweeps as the forms allow.

    weights   (e, m, n) blocks whose e add up to b, in place
    taken     the momentum, and the product that error feedback takes out of it
    settle    called with each block, or with all, once they are written
    """
    one_by_one = move.cautious or (_per_matrix(move.decay) and not _plain(weights, rounding))
    # on a device the size stays apart: 16-bit operands cannot hold small sizes
    if _per_matrix(move.size) and (one_by_one or update.left is None or weights[0].device.type == "cpu"):
        update, move = _sized(update, move), Move(1.0, move.decay, move.rate, move.cautious)
    if taken is not None and (one_by_one or update.full is not None or _per_matrix(move.decay)):
        take_product(*taken, precision, skip)
        taken = None
    if one_by_one:
        _formed(weights, update, move, rounding, settle)
        return
    decay, alpha = move.decay, -move.size
    if isinstance(decay, Tensor) and decay.ndim:
        for weight, factor in zip(weights, blocks(decay, weights), strict=True):
            weight.mul_(factor)
        decay = 1.0
    if update.full is not None and update.left is not None:
        _product_and_rows(weights, update, alpha, decay, precision, rounding, settle)
        return
    if update.left is not None and update.right is not None:
        if taken is not None:
            added = Product(update.left, update.right, alpha)
            add_products(*taken, weights, added, decay, precision, rounding, skip)
        else:
            add_product(weights, update.left, update.right, alpha, decay, precision, rounding)
    else:
        assert update.full is not None
        full = update.full if update.rows is None else _times_rows(update.full, update.rows)
        add_scaled(weights, full, alpha, decay, rounding, skip)
    if settle is not None:
        settle(slice(None))


def _times_rows(full: Tensor, rows: Tensor) -> Tensor:
    """Return diag(rows) X in X's dtype, or in float32 for float16, which cannot hold small step sizes."""
    return (full * rows).to(torch.float32 if full.dtype == torch.float16 else full.dtype)


def _product_and_rows(
    weights: Sequence[Tensor],
    update: Applied,
    alpha: Scalar,
    decay: Scalar,
    precision: Precision | None,
    rounding: Sequence[Rounding] | None,
    settle: Callable[[slice], None] | None,
) -> None:
    left, right, rows, full = update.left, update.right, update.rows, update.full
    assert left is not None
    assert right is not None
    assert full is not None
    if rows is None:
        rows = left.new_ones(*left.shape[:2], 1)
    if weights[0].device.type != "cpu":
        add_product_and_rows(weights, left, right, rows, full, alpha, decay, precision, rounding)
        if settle:
            settle(slice(None))
        return
    if isinstance(alpha, Tensor):  # a scale that the host does not know: applied once here, not for every block
        left, rows, alpha = left * alpha, rows * alpha, 1.0
    factors = [blocks(each, weights) for each in (left, right, rows, full)]
    for number, (weight, L, R, d, X) in enumerate(zip(weights, *factors, strict=True)):
        add_product_and_rows([weight], L, R, d, X, alpha, decay, precision, rounding and [rounding[number]])
        if settle:  # while the block is in the cache
            settle(slice(number, number + 1))


def _formed(
    weights: Sequence[Tensor],
    update: Applied,
    move: Move,
    rounding: Sequence[Rounding] | None,
    settle: Callable[[slice], None] | None,
) -> None:
    """Write the weights from entries of U, formed in at least float32, on a CPU a piece of one matrix at a time."""
    start = 0
    for number, weight in enumerate(weights):
        count = weight.shape[0]
        wide = torch.promote_types(weight.dtype, torch.float32)
        # stochastic rounding works on a whole block
        rounded = weight if rounding is None else weight.to(wide)
        for matrix, place in _pieces(weight, rounded):
            u = _entries(update, start, place, wide)
            moved = matrix.to(wide)
            _move_(moved, u, move, start, place)
            if moved is not matrix:
                matrix.copy_(moved)
        if rounding is not None:
            rounding[number](weight, rounded)
        start += count
        if settle:
            settle(slice(number, number + 1))


# Which matrices of a block, and which of their rows.
Place = tuple[slice, slice]


def _pieces(weight: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Place]]:
    e, m, n = weight.shape
    if weight.device.type != "cpu":
        yield target, (slice(0, e), slice(0, m))
        return
    step = max(1, FORMED // max(1, n))
    for i in range(e):
        for first in range(0, m, step):
            rows = slice(first, min(m, first + step))
            yield target[i : i + 1, rows], (slice(i, i + 1), rows)


def _entries(update: Applied, start: int, place: Place, wide: torch.dtype) -> Tensor:
    """Return the entries of U at a place of the block that begins at matrix ``start``."""
    matrices, rows = slice(start + place[0].start, start + place[0].stop), place[1]
    u: Tensor | None = None
    if update.full is not None:
        u = update.full[matrices, rows].to(wide)
        u = u if update.rows is None else u * update.rows[matrices, rows].to(wide)
    if update.left is not None and update.right is not None:
        L, R = update.left[matrices, rows].to(wide), update.right[matrices].to(wide)
        u = multiply(L, R.mT) if u is None else multiply_add(u, L, R.mT, out=u)
    assert u is not None
    return u


def _move_(w: Tensor, u: Tensor, move: Move, start: int, place: Place) -> None:
    """Write w = decay w - size u in place."""
    decay = move.decay
    if isinstance(decay, Tensor) and decay.ndim:
        decay = decay[start + place[0].start : start + place[0].stop]
    if move.cautious:
        mask = torch.mul(u, w).ge_(0)  # 1.0 or 0.0
        if isinstance(decay, Tensor):
            w.addcmul_(w, mask.mul_(decay - 1))
        else:
            w.addcmul_(w, mask, value=decay - 1)
    else:
        w.mul_(decay)
    if isinstance(move.size, Tensor):
        w.addcmul_(u, move.size, value=-1)
    else:
        w.add_(u, alpha=-move.size)


def _sized(update: Applied, move: Move) -> Applied:
    """Return the update with the size of each matrix (b, 1, 1) in its factors."""
    size = move.size
    assert isinstance(size, Tensor)
    left = None if update.left is None else (update.left * size).to(update.left.dtype)
    rows = update.rows
    if update.full is not None:
        rows = size.expand(-1, update.full.shape[1], 1) if rows is None else rows * size
    return Applied(left, update.right, rows, update.full)


def _per_matrix(number: Scalar) -> bool:
    return isinstance(number, Tensor) and number.ndim > 0


def _plain(weights: Sequence[Tensor], rounding: Sequence[Rounding] | None) -> bool:
    return rounding is None and all(weight.dtype in WIDE for weight in weights)
