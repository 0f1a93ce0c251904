"""The oracle of orthonormalization: Householder QR, Y = P R with R_jj > 0, by LAPACK's geqrf and orgqr.

Y, P (b, m, r). Dependent columns are set aside, by `linalg.columns`' account of noise, and the rest factored again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.columns import NoiseFloor, column_noise, inverse_triangle, near_one, propagated_noise
from orthoshard.linalg.products import multiply, multiply_add


def householder(y: Tensor, floor: NoiseFloor = None) -> Tensor:
    """Orthonormal columns of ``y``: see `orthoshard.linalg.cholesky`."""
    y, noise = unit_columns(y, floor)
    m, r = y.shape[1:]
    if y.numel() == 0:
        return y
    if m < r:
        y = torch.nn.functional.pad(y, (0, 0, 0, r - m))
    q, triangle = torch.linalg.qr(y)
    live = independent(triangle, noise)
    if not bool(live.all()):
        q, triangle = torch.linalg.qr(set_aside(y, live))
    sign = live.to(y.dtype).copysign(triangle.diagonal(dim1=1, dim2=2))
    return q[:, :m] * sign[:, None, :]


def unit_columns(y: Tensor, floor: NoiseFloor) -> tuple[Tensor, Tensor]:
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


def invertible(r: Tensor) -> Tensor:
    """R (b, r, r) of a Y with unit columns, its diagonal kept from 0, which would make all of R⁻¹ NaN."""
    diagonal = r.diagonal(dim1=1, dim2=2)
    least = torch.finfo(r.dtype).eps / 1024
    return r + torch.diag_embed((diagonal.abs() < least).to(r.dtype) * least)


def independent(r: Tensor, noise: Tensor) -> Tensor:
    """Which columns of Y = Q R are not dependent on the ones before, (b, r), from R (b, r, r) of a QR factorization.

    Columns are judged from left to right, and a dependent one is never held against a later one: what is left of
    it is noise. Done for all at once: columns that are dependent on *all* before them are candidates; a candidate is
    judged again, against the columns before it that are not candidates, and rejected, or given back for the next
    round. Each round rejects at least the first candidate of a matrix.
    """
    live = noise < 1
    while True:
        triangle = r if bool(live.all()) else torch.linalg.qr(set_aside(r, live)).R
        x = inverse_triangle(invertible(triangle))
        candidate = live & ~(propagated_noise(x, noise) < 1)
        if not bool(candidate.any()):
            return live
        accepted = live & ~candidate
        q, triangle = torch.linalg.qr(set_aside(r, accepted))
        q = q[:, : r.shape[1]] * accepted[:, None, :]
        onto = torch.triu(multiply(q.mT, r), diagonal=1)
        rest = torch.linalg.vector_norm(multiply_add(r, q, onto, alpha=-1), dim=1)
        error = torch.hypot(noise, propagated_noise(multiply(inverse_triangle(triangle), onto), noise))
        rejected = candidate & (rest <= error)
        if not bool(rejected.any()):  # only rounding separates the two judgements
            return accepted
        live = live & ~rejected
