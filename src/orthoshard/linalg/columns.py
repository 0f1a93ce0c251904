"""What the three orthonormalizations agree on: when a column is noise, and how a column is taken out.

Y (b, m, r) comes with the norm of the rounding error of each of its columns, ``noise`` (b, r). A direction is noise
when it is no longer than its own error. With Y = P R and X = R⁻¹, column j of P is sum_i Y_i X_ij, so its error is

    e_j = sqrt( sum_i (X_ij noise_i)² ),

and column j is *dependent* on the columns before it when e_j >= 1. Where the columns have unit length and the same
noise, that is ||X_j|| >= 1 / noise: no smaller change of Y could make column j a combination of the earlier ones. A
threshold on R_jj alone would not do: the error of the earlier columns enters column j through its coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.looking import holds, may_look
from orthoshard.linalg.products import multiply, multiply_add
from orthoshard.linalg.scale import largest, power_of_two

# A column shorter than this, in a matrix whose largest entry is about 1, counts as zero: its squares must still be
# normal numbers in float32, with all their digits.
VANISHING = 2.0**-50
# The relative error of a column in roundings (eps / 2): of the dtype it came in, and of the dtype it is treated in.
# Measured on products of inner length 1 to 150, rows 200 to 3072: rounding makes 0.4 to 4 of them, Householder QR
# (the least exact method here) up to 11 in float32 and 40 in float64. Float32 leaves little room: 16 is 1e-6.
DATA_ROUNDINGS = 2
COMPUTING_ROUNDINGS = {torch.float32: 14, torch.float64: 64}


# More than the norm of any column, and its square times that of any entry of R⁻¹ fits float64.
LARGEST_FLOOR = 2.0**100

# The error of the columns of Y where it is more than rounding: norms (b, 1, 1) or (b, 1, r), or a share of the norm of
# the longest column of each matrix.
Floor = Tensor | float | None


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def column_noise(norms: Tensor, floor: Floor, dtype: torch.dtype) -> Tensor:
    """The error of each column, (b, r), from its norm (b, r): rounding from ``dtype``, or ``floor`` if it is more.

    A column whose norm is not above its noise is zero.
    """
    computing = computing_dtype(dtype)
    eps, computing_eps = torch.finfo(dtype).eps, torch.finfo(computing).eps
    relative = (DATA_ROUNDINGS * eps + COMPUTING_ROUNDINGS[computing] * computing_eps) / 2
    noise = torch.where(norms > VANISHING, norms * relative, VANISHING)
    if floor is None:
        return noise
    if isinstance(floor, Tensor):
        return torch.maximum(noise, floor[:, 0].to(norms.dtype).clamp(max=LARGEST_FLOOR))
    return torch.maximum(noise, floor * norms.amax(1, keepdim=True))


def near_one(y: Tensor, floor: Floor) -> tuple[Tensor, Floor]:
    """``y`` in its computing dtype, and ``floor``, over a power of two that brings ``y``'s largest entry near 1."""
    size = largest(y)
    y = y.to(computing_dtype(y.dtype))
    size = size.to(y.dtype)
    # This saves the copy where no scaling is needed.
    if may_look(y) and holds(((size > 2.0**-6) & (size < 2.0**10)).all()):
        return y, floor
    return over(y, floor, power_of_two(size))


def over(y: Tensor, floor: Floor, scale: Tensor) -> tuple[Tensor, Floor]:
    """``y``, and ``floor`` where it is a length, over ``scale`` (b, 1, 1)."""
    return y / scale, floor.to(y.dtype) / scale if isinstance(floor, Tensor) else floor


def unit_columns(y: Tensor, floor: Floor) -> tuple[Tensor, Tensor]:
    """Y with columns of unit length, zero where they are noise; and their noise (b, r), 1 where they are zero."""
    dtype = y.dtype
    y, floor = near_one(y, floor)
    norms = torch.linalg.vector_norm(y, dim=1)
    noise = column_noise(norms, floor, dtype)
    live = norms > noise
    y = y * torch.where(live, 1 / norms, 0)[:, None, :]
    return y, torch.where(live, noise / norms, 1)


def set_aside(y: Tensor, live: Tensor) -> Tensor:
    """Y with each column that is not ``live`` (b, r) replaced by a unit vector in a row of its own: (b, m + r, r).

    Such a column is orthogonal to all others, so that a QR factorization treats them as if it were not there.
    """
    return torch.cat([y * live[:, None, :], torch.diag_embed((~live).to(y.dtype))], dim=1)


def inverse_triangle(r: Tensor, eye: Tensor | None = None) -> Tensor:
    """R⁻¹ of upper triangular R (b, r, r) with a non-zero diagonal. ``eye``: I (r, r), where the caller has one."""
    if eye is None:
        eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye.expand_as(r), upper=True)


def invertible(r: Tensor) -> Tensor:
    """R (b, r, r) of a Y with unit columns, its diagonal kept from 0, which would make all of R⁻¹ NaN."""
    diagonal = r.diagonal(dim1=1, dim2=2)
    least = torch.finfo(r.dtype).eps / 1024
    return r + torch.diag_embed((diagonal.abs() < least).to(r.dtype) * least)


def carried(x: Tensor, noise: Tensor) -> Tensor:
    """e_j = sqrt(sum_i (X_ij noise_i)²), (b, r)."""
    weighted = x * noise[:, :, None]  # before squaring: columns of very different size have squares that do not fit
    return multiply(noise.new_ones(noise.shape[0], 1, noise.shape[1]), weighted.square_())[:, 0].sqrt()


def independent(r: Tensor, noise: Tensor) -> Tensor:
    """Which columns of Y = Q R are not dependent on the ones before, (b, r), from R (b, r, r) of a QR factorization.

    Columns are judged from left to right, and a dependent one is never held against a later one: what is left of
    it is noise. Done for all at once: columns that are dependent on *all* before them are suspects; a suspect is
    judged again, against the columns before it that are not suspects, and convicted, or given back for the next
    round. Each round convicts at least the first suspect of a matrix.
    """
    live = noise < 1
    while True:
        triangle = r if bool(live.all()) else torch.linalg.qr(set_aside(r, live)).R
        x = inverse_triangle(invertible(triangle))
        suspect = live & ~(carried(x, noise) < 1)
        if not bool(suspect.any()):
            return live
        trusted = live & ~suspect
        q, triangle = torch.linalg.qr(set_aside(r, trusted))
        q = q[:, : r.shape[1]] * trusted[:, None, :]
        onto = torch.triu(multiply(q.mT, r), diagonal=1)
        rest = torch.linalg.vector_norm(multiply_add(r, q, onto, alpha=-1), dim=1)
        error = torch.hypot(noise, carried(multiply(inverse_triangle(triangle), onto), noise))
        convicted = suspect & (rest <= error)
        if not bool(convicted.any()):  # only rounding separates the two judgements
            return trusted
        live = live & ~convicted
