"""The passes over full-size matrices that matrix rules make, each in one sweep through memory.

    accumulate              M = decay M + G, and the largest entry of M
    look_ahead              N = (G + decay M) / (1 + decay) for the M that M = decay M + G will be (Nesterov); the size
                            and the row norms of N
    look_back               M = ((1 + decay) N - G) / decay, where N took the place of M
    scaled_copy             a X in another dtype
    wide_row_squares        squared row norms of X in float64
    add_product             W = decay W + alpha L Rᵀ
    add_product_and_rows    W = decay W + alpha (L Rᵀ + diag(d) N)
    add_scaled              W = decay W + alpha O
    add_products            M += alpha' a L' R'ᵀ, and W = decay W + alpha L Rᵀ

These are torch's forms. `linalg.forms` may put other forms in their place; rules cannot tell the difference.

A pass that takes ``skip`` changes nothing if that flag is up, see `linalg.found_inf`. Weights also stay as they are if
``alpha`` is 0 and ``decay`` is 1, provided that their factors are finite; those of the momentum's product must be.

M, N are one tensor (b, m, n). Weights and gradients belong to their parameters and come as lists of (e, m, n) blocks
whose e add up to b, in the order of the batch. L is (b, m, r), R (b, n, r), d (b, m, 1), O (b, m, n), a (b, 1, 1).
``alpha`` and ``decay`` are numbers, or 0-d tensors if a step must not touch the host.
Weights are rounded to nearest, or by ``rounding``, one for each block; never together with ``skip``.
May import torch, `linalg.cpu`, `linalg.forms`, `linalg.host_sync`, `linalg.found_inf`, `linalg.products`,
`linalg.rounding`, `linalg.scale` and `linalg.unit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.forms import replaceable
from orthoshard.linalg.found_inf import WIDE, FoundInf, axpby_, decay_
from orthoshard.linalg.host_sync import holds, sync_is_free
from orthoshard.linalg.products import Precision, Scalar, rank_r_update_, rounds_to_bf16
from orthoshard.linalg.rounding import Rounding
from orthoshard.linalg.scale import ORDINARY, largest, scaled
from orthoshard.linalg.unit import row_squares

# Small enough that 1 - 1e-20 rounds to 1, large enough that a quotient by it is still a number in bfloat16.
LEAST_BLEND = 1e-20


class Product(NamedTuple):
    """alpha a L Rᵀ. ``scale`` a: one number per matrix, (b, 1, 1), or None for 1. ``bears``: the factor that can be
    multiplied by a without overflow. ``uneven``: the rows of L or R may differ in length by
    more than float16 can hold."""

    left: Tensor
    right: Tensor
    alpha: Scalar
    scale: Tensor | None = None
    bears: Literal["left", "right"] = "right"
    uneven: bool = False

    def transposed(self) -> Product:
        bears: Literal["left", "right"] = "left" if self.bears == "right" else "right"
        return self._replace(left=self.right, right=self.left, bears=bears)


def blocks(batch: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the slices of ``batch`` (b, ...) that stand for the blocks (e, ...) of ``like``, in order."""
    start = 0
    for block in like:
        yield batch[start : start + block.shape[0]]
        start += block.shape[0]
    assert start == batch.shape[0], (start, batch.shape)


@replaceable
def accumulate(
    momentum: Tensor, gradients: Sequence[Tensor], decay: float = 1.0, skip: FoundInf | None = None
) -> Tensor:
    """Add gradients to the momentum, M = decay M + G, in place. Returns the largest absolute entry
    of each matrix, (b, 1, 1)."""
    if not momentum.numel():
        return momentum.new_zeros(momentum.shape[0], 1, 1)
    parts = list(blocks(momentum, gradients))
    if skip is not None:
        axpby_(parts, gradients, decay, 1.0, skip)
    elif momentum.device.type == "cpu":
        return cpu.accumulate(momentum, gradients, decay)
    else:
        for part, gradient in zip(parts, gradients, strict=True):
            torch.add(gradient, part, alpha=decay, out=part)
    return largest(momentum)


@replaceable
def look_ahead(
    momentum: Tensor, gradients: Sequence[Tensor], decay: float, skip: FoundInf | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what Nesterov's momentum sees after M = decay M + G, up to a factor: N = (G + decay M) / (1 + decay).

    In terms of the old M that is G + decay² / (1 + decay) M, one sweep. In float32 and wider N takes the place of M,
    and `look_back` then restores the new M.

    Returns N, the size of each matrix (b, 1, 1), and its squared row norms (b, m, 1). The size is the longest row if
    squares are ordinary numbers, otherwise the largest entry. On a device the squares are in float64, because no read
    tells whether less would hold them. A new tensor for N in each step would cost more than the products with a thin Q:
    on a CPU five times this pass (measured), because the system has to clear its pages. Narrower dtypes do get a tensor
    of their own, as M would otherwise be rounded twice.
    """
    wide = momentum.dtype in (torch.float32, torch.float64)
    N = momentum if wide else torch.empty_like(momentum)
    ahead = decay**2 / (1 + decay)
    sums = [(N, ahead)] if wide else [(N, ahead), (momentum, decay)]
    if skip is not None:
        if not wide:
            N.copy_(momentum)
        for out, factor in sums:
            axpby_(list(blocks(out, gradients)), gradients, factor, 1.0, skip)
    elif momentum.device.type == "cpu" and momentum.numel():
        squares = cpu.look_ahead(N, momentum, gradients, ahead, decay)
        return N, _size(N, squares), squares
    else:
        for out, factor in sums:
            for to, m, g in zip(blocks(out, gradients), blocks(momentum, gradients), gradients, strict=True):
                torch.add(g, m, alpha=factor, out=to)
    squares = row_squares(N) if sync_is_free(N) else wide_row_squares(N)
    return N, _size(N, squares), squares


@replaceable
def look_back(N: Sequence[Tensor], gradients: Sequence[Tensor], decay: float, skip: FoundInf | None = None) -> None:
    """Restore M = ((1 + decay) N - G) / decay in place of N, in blocks (e, m, n). decay is above 0."""
    if skip is not None:
        axpby_(N, gradients, (1 + decay) / decay, -1 / decay, skip)
        return
    for n, gradient in zip(N, gradients, strict=True):
        if gradient.dtype == n.dtype:
            torch.lerp(n, gradient, -1 / decay, out=n)
        else:
            n.mul_((1 + decay) / decay).sub_(gradient, alpha=1 / decay)


@replaceable
def scaled_copy(X: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a X in ``dtype`` (b, m, n), a (b, 1, 1), (b, m, 1) or (b, 1, n); rounded once if a is in float64."""
    return torch.mul(X, scale, out=torch.empty_like(X, dtype=dtype))


@replaceable
def wide_row_squares(X: Tensor) -> Tensor:
    """Return the squared row norms of X, (b, m, 1), in float64, which holds the squares of anything narrower."""
    return row_squares(X, torch.float64)


def _size(X: Tensor, squares: Tensor) -> Tensor:
    """Return the longest row of each matrix of X, (b, 1, 1), or its largest entry if squares
    may overflow or underflow."""
    if sync_is_free(X) and X.numel():
        low, high = ORDINARY
        longest = squares.amax(1, keepdim=True).sqrt()
        if holds(((longest > low) & (longest < high)).all()):
            return longest
    return largest(X)


@replaceable
def add_product(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    alpha: Scalar,
    decay: Scalar,
    precision: Precision | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> None:
    """Add a product to weights, W = decay W + alpha L Rᵀ, in place and in one sweep, without forming L Rᵀ.

    See `products.rank_r_update_`. alpha: a number, or (b, 1, 1). In bfloat16 decay W would round to W itself. So if
    ``decay`` is a tensor, which no product takes, the update is W + d (T - W), rounded once, with d = 1 - decay and
    T = alpha/d L Rᵀ; this costs two more sweeps.
    """
    dtype = weights[0].dtype
    blend: Tensor | None = None
    if isinstance(decay, Tensor) and dtype == torch.bfloat16 and rounding is None:
        blend = (1 - decay).clamp(min=LEAST_BLEND).to(dtype)
        alpha = alpha / blend.double()
    if isinstance(alpha, Tensor):
        left, alpha = left * alpha, 1.0  # a scale that the host does not know goes into the thin factor
    if isinstance(decay, Tensor) and dtype in WIDE:  # needs a sweep of its own in any case
        decay_(weights, decay)
        decay = 1.0
    dtype = dtype if rounding is None else torch.float32
    taken = (
        torch.bfloat16
        if rounds_to_bf16(dtype, weights[0].device, precision) and left.dtype == torch.bfloat16
        else dtype
    )
    left, right = left.to(taken), right.to(taken)
    for number, (weight, L, R) in enumerate(zip(weights, blocks(left, weights), blocks(right, weights), strict=True)):
        if blend is not None:
            weight.lerp_(torch.bmm(L, R.mT), blend)
            continue
        wide = weight.to(dtype)
        rank_r_update_(wide, L, R, alpha, decay, precision)
        if rounding is not None:
            rounding[number](weight, wide)


@replaceable
def add_product_and_rows(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    rows: Tensor,
    N: Tensor,
    alpha: Scalar,
    decay: Scalar,
    precision: Precision | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> None:
    """Add to weights, W = decay W + alpha (L Rᵀ + diag(rows) N), in place. Below float32 the sum is rounded once.
    alpha: a number, or (b, 1, 1)."""
    if isinstance(alpha, Tensor):
        left, rows, alpha = left * alpha, rows * alpha, 1.0
    factors = [blocks(each, weights) for each in (left, right, rows, N)]
    for number, (weight, L, R, d, X) in enumerate(zip(weights, *factors, strict=True)):
        if weight.dtype == X.dtype and X.dtype in (torch.float32, torch.float64):
            add_product([weight], L, R, alpha, decay, precision)
            weight.addcmul_(d * alpha, X)  # the weight is still in the cache
            continue
        wide = torch.promote_types(X.dtype, torch.float32)
        update = X.to(wide) * d
        rank_r_update_(update, L.to(wide), R.to(wide), 1.0, 1.0, precision)
        add_scaled([weight], update, alpha, decay, rounding and [rounding[number]])


@replaceable
def add_scaled(
    weights: Sequence[Tensor],
    update: Tensor,
    alpha: Scalar,
    decay: Scalar,
    rounding: Sequence[Rounding] | None = None,
    skip: FoundInf | None = None,
) -> None:
    """Add to weights, W = decay W + alpha O, in place. Below float32 the sum is formed in float32 and rounded once.

    If ``skip`` is up, O may hold anything; decay is then 1.
    """
    if skip is not None and update.dtype in WIDE and all(weight.dtype == update.dtype for weight in weights):
        decay_(weights, decay)
        axpby_(weights, list(blocks(update, weights)), 1.0, alpha, skip)
        return
    for number, (weight, o) in enumerate(zip(weights, blocks(update, weights), strict=True)):
        if skip is None and weight.dtype in WIDE and weight.dtype == o.dtype:
            decay_([weight], decay)
            if isinstance(alpha, Tensor):
                weight.addcmul_(o, alpha)
            else:
                weight.add_(o, alpha=alpha)
        else:
            wide = torch.promote_types(weight.dtype, torch.float32)
            moved = weight.to(wide, copy=True).mul_(decay).add_(o.to(wide) * alpha)
            narrow = rounding[number] if rounding else Tensor.copy_
            narrow(weight, moved if skip is None else torch.where(skip.flag, weight, moved))


@replaceable
def add_products(
    momentum: Tensor,
    taken: Product,
    weights: Sequence[Tensor],
    added: Product,
    decay: Scalar,
    precision: Precision | None = None,
    rounding: Sequence[Rounding] | None = None,
    skip: FoundInf | None = None,
) -> None:
    """Do `take_product` and `add_product` in one call: M += alpha' a L' R'ᵀ and W = decay W + alpha L Rᵀ, in place.

    The factors of both may be the same tensors. There may be more weights than momenta: those that
    ``added`` has factors for.
    """
    take_product(momentum, taken, precision, skip)
    add_product(weights, added.left, added.right, added.alpha, decay, precision, rounding)


@replaceable
def take_product(
    momentum: Tensor, taken: Product, precision: Precision | None = None, skip: FoundInf | None = None
) -> None:
    """Add a product to the momentum, M += alpha a L Rᵀ, in place. The product goes into M, never into its transpose:
    torch has no fast CPU kernel for that in bfloat16."""
    left, right, alpha, scale, bears, _ = taken
    assert isinstance(alpha, float)
    if bears == "left":
        left = scaled(left, scale, skip)
    else:
        right = scaled(right, scale, skip)
    rank_r_update_(momentum, left, right, alpha, 1.0, precision)
