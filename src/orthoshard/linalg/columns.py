"""When a column is noise: the rule that all orthonormalizations share.

Y (b, m, r) comes with the norm of the rounding error of each of its columns, ``noise`` (b, r). A direction is noise
if it is no longer than its own error. With Y = P R and X = R⁻¹, column j of P is sum_i Y_i X_ij, so its error is

    e_j = sqrt( sum_i (X_ij noise_i)² ),

and column j is *dependent* on the columns before it if e_j >= 1. If the columns have unit length and the same
noise, that is ||X_j|| >= 1 / noise: no smaller change of Y could make column j a combination of the earlier ones. A
threshold on R_jj alone would not suffice: the error of the earlier columns enters column j through its coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.host_sync import holds, sync_is_free
from orthoshard.linalg.products import multiply
from orthoshard.linalg.scale import largest, power_of_two

# A column shorter than this, in a matrix whose longest column is about 1, counts as zero: squares must still be normal
# numbers in float32, with all their digits.
VANISHING = 2.0**-50
# The relative error of a column in roundings (eps / 2): of the dtype it came in, and of the dtype of the computation.
# Measured on products of inner length 1 to 150, rows 200 to 3072: rounding makes 0.4 to 4 of them, Householder QR
# (the least exact method here) up to 11 in float32 and 40 in float64. Float32 leaves little room: 16 is 1e-6.
DATA_ROUNDINGS = 2
COMPUTING_ROUNDINGS = {torch.float32: 14, torch.float64: 64}
# Above the norm of any column, and small enough that its square times that of any entry of R⁻¹ fits float64.
LARGEST_FLOOR = 2.0**100

# The error of the columns of Y, if it is more than rounding: norms (b, 1, 1) or (b, 1, r), or a share of the norm of
# the longest column of each matrix.
NoiseFloor = Tensor | float | None


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for anything narrower, and other dtypes as they are."""
    return torch.promote_types(dtype, torch.float32)


def relative_noise(dtype: torch.dtype) -> float:
    """Return the error of a column that came in ``dtype``, from rounding, as a share of its norm."""
    computing = computing_dtype(dtype)
    eps, computing_eps = torch.finfo(dtype).eps, torch.finfo(computing).eps
    return (DATA_ROUNDINGS * eps + COMPUTING_ROUNDINGS[computing] * computing_eps) / 2


def column_noise(norms: Tensor, floor: NoiseFloor, dtype: torch.dtype) -> Tensor:
    """Return the error of each column, (b, r), from its norm (b, r): rounding from ``dtype``,
    or ``floor`` if it is more.

    A column whose norm is not above its noise is zero.
    """
    noise = torch.where(norms > VANISHING, norms * relative_noise(dtype), VANISHING)
    if floor is None:
        return noise
    if isinstance(floor, Tensor):
        return torch.maximum(noise, floor[:, 0].to(norms.dtype).clamp(max=LARGEST_FLOOR))
    return torch.maximum(noise, floor * norms.amax(1, keepdim=True))


def near_one(y: Tensor, floor: NoiseFloor) -> tuple[Tensor, NoiseFloor]:
    """Divide ``y``, in its computing dtype, and ``floor`` by a power of two that brings
    ``y``'s largest entry near 1."""
    size = largest(y)
    y = y.to(computing_dtype(y.dtype))
    size = size.to(y.dtype)
    # This saves a copy if no scaling is needed.
    if sync_is_free(y) and holds(((size > 2.0**-6) & (size < 2.0**10)).all()):
        return y, floor
    return over(y, floor, power_of_two(size))


def over(y: Tensor, floor: NoiseFloor, scale: Tensor) -> tuple[Tensor, NoiseFloor]:
    """Divide ``y``, and ``floor`` if it is a length, by ``scale`` (b, 1, 1)."""
    return y / scale, floor.to(y.dtype) / scale if isinstance(floor, Tensor) else floor


def inverse_triangle(r: Tensor, eye: Tensor | None = None) -> Tensor:
    """Return R⁻¹ of upper triangular R (b, r, r) with a non-zero diagonal. ``eye``: I (r, r), if the caller has one."""
    if eye is None:
        eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye.expand_as(r), upper=True)


def propagated_noise(x: Tensor, noise: Tensor) -> Tensor:
    """Return e_j = sqrt(sum_i (X_ij noise_i)²), (b, r)."""
    weighted = x * noise[:, :, None]  # before squaring: squares of very different columns may over- or underflow
    return multiply(noise.new_ones(noise.shape[0], 1, noise.shape[1]), weighted.square_())[:, 0].sqrt()
