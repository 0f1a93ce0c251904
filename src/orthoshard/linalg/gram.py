"""Factors of small Gram matrices: X upper triangular with Xᵀ G X = I, so that the columns of Y X are orthonormal.

G = YᵀY (b, r, r), X (b, r, r). ``inverse_factor`` is plain; ``careful_factor`` also sets noise aside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthoshard.linalg.columns import carried, inverse_triangle
from orthoshard.linalg.looking import holds
from orthoshard.linalg.products import multiply, multiply_add

# Below this size LAPACK's Cholesky and triangular inverse beat batched products (measured: 24 to 64 are alike on CPU).
CPU_BLOCK = 32
OTHER_BLOCK = 256


def inverse_factor(gram: Tensor, eye: Tensor | None = None, *, definite: bool = False) -> Tensor:
    """X = R⁻¹ for G = RᵀR, by halves, so that nearly all the work is batched products.

        G = [G11 G12]    X11 from G11,  B = X11ᵀ G12,  X22 from G22 - BᵀB,  X12 = -X11 B X22
            [ .  G22]

    A matrix that is not positive definite, to rounding, gives NaN, unless the caller knows that none is: ``definite``.
    No element of the batch affects another. ``eye``: I (r, r), where the caller has one.
    """
    b, r = gram.shape[:2]
    block = CPU_BLOCK if gram.device.type == "cpu" else OTHER_BLOCK
    if r <= block:
        lower, info = torch.linalg.cholesky_ex(gram)
        x = inverse_triangle(lower.mT, eye)
        return x if definite else x.masked_fill_((info != 0).view(b, 1, 1), math.nan)
    h = -(-r // 16) * 8  # half of r, rounded up to a multiple of 8 for the sake of vector units
    x = torch.zeros_like(gram)
    first, second = (None, None) if eye is None else (eye[:h, :h], eye[h:, h:])
    x11 = x[:, :h, :h].copy_(inverse_factor(gram[:, :h, :h], first, definite=definite))
    onto = multiply(x11.mT, gram[:, :h, h:])
    left = multiply_add(gram[:, h:, h:], onto.mT, onto, alpha=-1)
    x22 = x[:, h:, h:].copy_(inverse_factor(left, second, definite=definite))
    x[:, :h, h:] = multiply(x11, multiply(onto, x22)).neg_()
    return x


def set_aside(gram: Tensor, live: Tensor) -> Tensor:
    """G with 1 on the diagonal, and 0 beside it, for each column that is not ``live`` (b, r)."""
    return gram * (live[:, :, None] & live[:, None, :]) + torch.diag_embed((~live).to(gram.dtype))


class Factor(NamedTuple):
    """What multiplies Y, and what is known of Y X afterwards."""

    x: Tensor  # (b, r, r), upper triangular
    noise: Tensor  # (b, r): the error of each column of Y X
    amplification: Tensor  # (b,): max_j ||R⁻¹e_j||² for Y with unit columns; inf where a column is postponed
    error: Tensor  # (b,): the relative error of G; times amplification: that of the entries of (YX)ᵀ(YX)


def plain_factor(gram: Tensor, noise: Tensor) -> Factor:
    """X for a G whose live columns are well conditioned; `sound` says whether they were. Computes in G's dtype.

    ``noise`` (b, r) is the error of the columns of Y. Reads flags.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    live = ~(squares <= noise.square())  # so written that NaN counts as live and shows in the result
    whole = holds(live.all())
    x = inverse_factor(gram) if whole else inverse_factor(set_aside(gram, live)) * live[:, None, :]
    amplification = carried(x, squares.sqrt()).square().amax(1)
    return Factor(x, carried(x, noise), amplification, torch.full_like(amplification, torch.finfo(gram.dtype).eps))


def sound(factor: Factor) -> Tensor:
    """Whether each G (b,) was far enough from singular for `plain_factor`: no dependent column, few digits lost."""
    room = 4 * (1 + math.sqrt(factor.x.shape[1]))
    return (factor.noise < 1).all(1) & (factor.amplification * factor.error * room < 1)


def careful_factor(gram: Tensor, noise: Tensor) -> Factor:
    """X for a G that may be singular. ``noise`` (b, r) is the error of the columns of Y: see `columns`.

    Dependent columns of Y are zero columns of Y X, and Y X is otherwise what it would be without them. A column so
    close to the ones before it that this G cannot tell what is left of it from rounding is *postponed*: its column of
    Y X is Y_j less its projection on the columns before, not normalized, for the next pass to judge by a fresh G.

    Columns are judged in rounds, as in `columns.independent`: as many as are needed, up to 8, after which what is still
    open is postponed. That reads flags, as `fixed.fixed_factor` does not.
    """
    eps = torch.finfo(gram.dtype).eps
    gram, noise = gram.double(), noise.double()
    squares = gram.diagonal(dim1=1, dim2=2)
    live = trusted = ~(squares <= noise.square())
    norms = torch.where(live, squares, 1).sqrt()
    # G is off by about this, relative to its diagonal and in spectral norm, from its own rounding and Cholesky's.
    unit = set_aside(gram, live) / (norms[:, :, None] * norms[:, None, :])
    error = 4 * eps * torch.linalg.vector_norm(unit, dim=(1, 2))[:, None]
    ridged = gram + torch.diag_embed(squares * error)  # keeps every pivot above rounding
    least = 8 * error * squares  # a smaller square is not told from rounding
    postponed = torch.zeros_like(live)
    x = within = blur = gram
    for _ in range(8):
        x = inverse_factor(set_aside(ridged, live))
        suspect = live & ~((carried(x, noise) < 1) & (carried(x, norms).square() * (8 * error) < 1))
        trusted = live & ~suspect
        x = inverse_factor(set_aside(ridged, trusted)) * trusted[:, None, :]
        onto = torch.triu(torch.bmm(x.mT, gram), diagonal=1)
        within = torch.bmm(x, onto)  # column j: the coefficients of Y_j's projection on the trusted columns before it
        rest = squares - onto.square().sum(1)
        blur = torch.hypot(noise, carried(within, noise))  # the error of what the projection leaves
        dependent = suspect & (torch.maximum(rest, least) <= blur.square())
        postponed = postponed | (suspect & ~dependent & (rest <= least))
        live = live & ~(dependent | postponed)
        if torch.equal(live, trusted):
            break
    postponed = postponed | (live & ~trusted)
    amplification = torch.where(postponed.any(1), math.inf, carried(x, norms).square().amax(1))
    noise = torch.where(trusted, carried(x, noise), torch.where(postponed, blur, 0))
    x = x + torch.diag_embed(postponed.to(x.dtype)) - within * postponed[:, None, :]
    return Factor(x, noise, amplification, error[:, 0])
