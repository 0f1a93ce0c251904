"""Orthonormal columns by Householder QR: Y = P R with R_jj > 0. The most trusted route, and the slowest on batches.

Y, P (b, m, r). LAPACK's geqrf and orgqr; dependent columns are set aside and the rest factored again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.columns import Floor, independent, set_aside, unit_columns


def householder(y: Tensor, floor: Floor = None) -> Tensor:
    """Orthonormal columns of ``y``: see `orthoshard.linalg.orthonormal`."""
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
