"""What is added to weights, and to weights and momentum together, each in one sweep and one launch for all weights.

    add_product_and_rows   W = decay W + alpha (L Rᵀ + diag(d) N)
    add_scaled             W = decay W + alpha O
    add_products           M += alpha' a L' Rᵀ  and  W = decay W + alpha L Rᵀ, if the two have R or L in common

W, M, N, O (b, m, n); L (b, m, r); R (b, n, r); d (b, m, 1); a (b, 1, 1) or None. Sums are formed in float32, or in
float64 for float64 weights, and rounded to the weight's dtype once: to nearest, or stochastically by the bits of
`linalg.rounding`. May import torch, `linalg` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.accumulate import Product
from ..linalg.forms import PLAIN
from ..linalg.found_inf import FoundInf
from ..linalg.products import Precision, Scalar
from ..linalg.rounding import Rounding, Stochastic
from .device.add import add_kernel, add_two_kernel
from .device.common import TYPES
from .launch import ALIGNED, cdiv, check, dot, launch, number_of, split, tile, wide
from .table import groups


def add_product_and_rows(
    weights: Sequence[Tensor], left: Tensor, right: Tensor, rows: Tensor, N: Tensor, alpha: Scalar, decay: Scalar,
    precision: Precision | None = None, rounding: Sequence[Rounding] | None = None,
) -> None:  # fmt: skip
    """Do `linalg.accumulate.add_product_and_rows`."""
    factors = torch.promote_types(weights[0].dtype, torch.float32)
    _launch(weights, left, right, rows, N, alpha, decay, factors, precision, rounding)


def add_scaled(
    weights: Sequence[Tensor],
    update: Tensor,
    alpha: Scalar,
    decay: Scalar,
    rounding: Sequence[Rounding] | None = None,
    skip: FoundInf | None = None,
) -> None:
    """Do `linalg.accumulate.add_scaled`."""
    _launch(weights, None, None, None, update, alpha, decay, weights[0].dtype, None, rounding, skip)


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
    """Do `linalg.accumulate.add_products`: in one pass if both products have a factor in common and are of the same
    matrices, otherwise in torch's two. (If replicas published their products, there are more weights than momenta.)"""
    common = taken.right is added.right or taken.left is added.left
    if taken.uneven and precision in ("tf32", "bfloat16"):
        common = False
    if not common or momentum.dtype != added.right.dtype or not any(weight.numel() for weight in weights):
        PLAIN["add_products"](momentum, taken, weights, added, decay, precision, rounding, skip)
        return
    if taken.right is not added.right:
        momentum, weights = momentum.mT, [weight.mT for weight in weights]
        rounding = None if rounding is None else [_transposed(each) for each in rounding]
        taken, added = taken.transposed(), added.transposed()
    check(momentum, *weights, *taken[:2], added.left)
    _, m, n = momentum.shape
    r = taken.right.shape[2]
    device = momentum.device
    left_M, left, right = _operands(precision, taken.left, added.left, taken.right)
    tile = _tiles(m, n, r, right.dtype)
    tiles = cdiv(m, tile["BM"]), cdiv(n, tile["BN"])
    alpha, alpha_at, alpha_step = split(added.alpha, device)
    beta, beta_at, _ = split(decay, device)
    for group in groups(weights, *_bits(weights, rounding)):
        launch(
            add_two_kernel, group.matrices * tiles[0] * tiles[1],
            group.table, momentum, left_M, left, right,
            None if taken.scale is None else taken.scale.reshape(-1).contiguous(),
            m, n, r, *tiles,
            *momentum.stride(), *group.strides, *left_M.stride(), *left.stride(), *right.stride(),
            float(taken.alpha), alpha, alpha_at, alpha_step, beta, beta_at, number_of(skip),
            *(group.beside or (0, 0, 0, 0)),
            W_TYPE=TYPES[group.dtype], F_TYPE=TYPES[_factors(right, weights, rounding)],
            T_M=wide(momentum.dtype), T=wide(group.dtype), ALIGNED=group.aligned, WIDTH=group.table.shape[1],
            PRECISION=dot(precision), **tile,
        )  # fmt: skip


def _transposed(rounding: Rounding) -> Rounding:
    if not isinstance(rounding, Stochastic):
        return rounding
    return Stochastic(rounding.rows.mT, rounding.columns.mT)


def _launch(
    weights: Sequence[Tensor], left: Tensor | None, right: Tensor | None, rows: Tensor | None, N: Tensor,
    alpha: Scalar, decay: Scalar, factors: torch.dtype, precision: Precision | None,
    rounding: Sequence[Rounding] | None, skip: FoundInf | None = None,
) -> None:  # fmt: skip
    check(*weights, N, *(x for x in (left, right, rows) if x is not None))
    if not any(weight.numel() for weight in weights):
        return
    _, m, n = weights[0].shape
    r = 0 if left is None else left.shape[2]
    device = weights[0].device
    if left is not None and right is not None:
        left, right = _operands(precision, left, right)
        factors = torch.float16 if right.dtype == torch.float16 else factors
    tile = _tiles(m, n, r, weights[0].dtype if right is None else factors)
    tiles = cdiv(m, tile["BM"]), cdiv(n, tile["BN"])
    size, size_at, size_step = split(alpha, device)
    beta, beta_at, _ = split(decay, device)
    none = (0, 0, 0)
    for group in groups(weights, *_bits(weights, rounding)):
        launch(
            add_kernel, group.matrices * tiles[0] * tiles[1],
            group.table, left, right, rows, N,
            m, n, r, *tiles,
            *group.strides, *(none if left is None else left.stride()), *(none if right is None else right.stride()),
            *(none[:2] if rows is None else rows.stride()[:2]), *N.stride(),
            size, size_at, size_step, beta, beta_at, number_of(skip), *(group.beside or (0, 0, 0, 0)),
            W_TYPE=TYPES[group.dtype], F_TYPE=TYPES[factors], T=wide(group.dtype), ALIGNED=group.aligned,
            WIDTH=group.table.shape[1], PRECISION=dot(precision), **tile,
        )  # fmt: skip


def _factors(factor: Tensor, weights: Sequence[Tensor], rounding: Sequence[Rounding] | None) -> torch.dtype:
    """Return the dtype to which factors are rounded before a product for these weights,
    unless they are narrow already."""
    if factor.dtype == torch.float16:
        return factor.dtype
    return weights[0].dtype if rounding is None else torch.float32


def _bits(weights: Sequence[Tensor], rounding: Sequence[Rounding] | None) -> tuple[list[Tensor], ...]:
    """Return the tensors that random bits are mixed from, two for each block; nothing if none are asked for."""
    if rounding is None:
        return ()
    known = [each for each in rounding if isinstance(each, Stochastic)]
    if len(known) < len(rounding) or any(weight.dtype != torch.bfloat16 for weight in weights):
        raise TypeError(
            "The Triton kernels round bfloat16 weights to nearest or by linalg.rounding.Stochastic, one for each "
            "block: give these, or choose kernels='torch'."
        )
    return [each.rows for each in known], [each.columns for each in known]


def _operands(precision: Precision | None, *factors: Tensor) -> list[Tensor]:
    """Return float32 factors in float16 if TF32 is permitted: it holds as many bits, takes half of the cache and is
    multiplied at twice the speed. Their columns are of about unit length, and no entry is above 65,504: see
    `stages.momentum.Momentum.taken`."""
    narrow = precision in ("tf32", "bfloat16") and all(x.dtype == torch.float32 for x in factors)
    return [x.half() if narrow else x for x in factors]


def _tiles(m: int, n: int, r: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose tiles. Without a product they are wide, to stream. With one they are small squares: then several programs
    of a multiprocessor wait for memory at a time, which larger squares, whose factors are read less often, do not
    allow. See docs/numerics.md. Smaller ones where neither matrices nor factors lie in whole vectors: their addresses
    would not leave registers enough (tests/kernels/test_compiles.py)."""
    if not r:
        return {"BM": tile(m, 32), "BN": tile(n, 128), "BK": 16}
    ragged = r % ALIGNED != 0 and (m % ALIGNED != 0 or n % ALIGNED != 0)
    side = 32 if ragged or dtype == torch.float64 else 64
    return {"BM": tile(m, side), "BN": tile(n, side), "BK": tile(r, 64 if dtype == torch.float16 else 32)}
