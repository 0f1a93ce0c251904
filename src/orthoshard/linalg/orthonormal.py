"""Orthonormal columns of Y (b, m, r): first version, to be replaced."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from orthoshard.linalg.scale import largest, power_of_two

Passes = Generator[Tensor, Tensor, Tensor]


def tolerance(dtype: torch.dtype) -> float:
    return 5 * torch.finfo(dtype).eps


def prepared(y: Tensor, floor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    size = power_of_two(largest(y).to(torch.promote_types(y.dtype, torch.float32)))
    return y.to(size.dtype) / size, None if floor is None else floor.to(size.dtype) / size


def householder(y: Tensor, floor: Tensor | None = None) -> Tensor:
    dtype = y.dtype
    noise = tolerance(y.dtype)
    y, floor = prepared(y, floor)
    norms = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    y = torch.where(norms > (0 if floor is None else floor), y / norms, 0)
    q, r = torch.linalg.qr(y)
    diagonal = r.diagonal(dim1=1, dim2=2)
    sign = torch.where(diagonal < 0, -1, 1) * (diagonal.abs() > noise)
    result = torch.zeros_like(y)
    result[:, :, : sign.shape[1]] = q * sign[:, None, :]
    return result.to(dtype)


def cholesky_qr_passes(y: Tensor, floor: Tensor | None = None) -> Passes:
    noise = tolerance(y.dtype)
    p = y
    for first in (True, False, False):
        wide = p.double() if first else p
        gram = yield wide.mT @ wide
        gram = gram.double()
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        low = 0.0 if floor is None or not first else floor.double().expand(-1, 1, y.shape[2])[:, 0]
        keep = norms > low
        inverse_norms = torch.where(keep, 1 / norms, 0)
        gram = gram * inverse_norms[:, :, None] * inverse_norms[:, None, :]
        eye = torch.eye(y.shape[2], dtype=torch.float64, device=y.device)
        for _ in range(2):
            masked = gram * (keep[:, :, None] & keep[:, None, :])
            masked.diagonal(dim1=1, dim2=2).copy_(1 + noise**2 / 16)
            lower, _ = torch.linalg.cholesky_ex(masked)
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            keep = keep & (inverse.norm(dim=2) * noise < 1)
            if not first:
                break
        factor = inverse.mT * inverse_norms[:, :, None] * keep[:, None, :] * keep[:, :, None]
        p = torch.bmm(p, factor.to(p.dtype))
    return p


def cholesky_qr(y: Tensor, floor: Tensor | None = None) -> Tensor:
    dtype = y.dtype
    y, floor = prepared(y, floor)
    passes = cholesky_qr_passes(y, floor)
    gram = next(passes)
    while True:
        try:
            gram = passes.send(gram)
        except StopIteration as stop:
            return stop.value.to(dtype)


def randomized_cholesky_qr(y: Tensor, floor: Tensor | None = None) -> Tensor:
    return cholesky_qr(y, floor)


ORTHONORMAL: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "householder": householder,
    "randomized_cholesky_qr": randomized_cholesky_qr,
    "cholesky_qr": cholesky_qr,
}
