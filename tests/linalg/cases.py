"""The matrices that every orthonormalization must treat: one table, crossed with methods and dtypes by the tests.

Each case makes a batch Y (b, m, r) in float64 and says which columns are independent, or that this is on the edge of
rounding (None). The oracle works in numpy's long double and shares nothing with the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

B, M, R = 2, 130, 24
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[torch.Generator], Tensor]
    # Independent columns, by index; "all"; or None where rounding to the dtype decides.
    live: Callable[[torch.dtype], list[int] | None]
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def y(self, dtype: torch.dtype) -> Tensor:
        return self.make(torch.Generator().manual_seed(7)).to(dtype)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def conditioned(g: torch.Generator, condition: float, m: int = M, r: int = R) -> Tensor:
    """U S Vᵀ with singular values in geometric progression."""
    u, v = torch.linalg.qr(normal(g, B, m, r)).Q, torch.linalg.qr(normal(g, B, r, r)).Q
    return (u * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)) @ v.mT


def duplicates(g: torch.Generator) -> Tensor:
    """Columns 5 and 9 repeat columns 1 and 2; column 11 is a multiple of column 1, column R - 1 a sum of two."""
    y = normal(g, B, M, R)
    y[:, :, 5] = y[:, :, 1]
    y[:, :, 9] = y[:, :, 2]
    y[:, :, 11] = y[:, :, 1] * -0.125
    y[:, :, R - 1] = y[:, :, 5]
    return y


def crowd(g: torch.Generator) -> Tensor:
    """Square, every column but the first and the last a copy of the first: the copies' noise could fill the space."""
    y = normal(g, B, R, R)
    y[:, :, 1:-1] = y[:, :, :1]
    return y


def with_zeros(g: torch.Generator) -> Tensor:
    y = normal(g, B, M, R)
    y[:, :, 0] = 0
    y[:, :, 7] = 0
    return y


def towering(g: torch.Generator) -> Tensor:
    y = normal(g, B, M, R)
    y[:, :, 3] *= 1e12
    return y


def every(_: torch.dtype) -> list[int]:
    return list(range(R))


def without(*columns: int) -> Callable[[torch.dtype], list[int]]:
    return lambda _: [j for j in range(R) if j not in columns]


def first(k: int) -> Callable[[torch.dtype], list[int]]:
    return lambda _: list(range(k))


def to_the_edge(condition: float) -> Callable[[torch.dtype], list[int] | None]:
    """All columns while the condition is clear of rounding."""
    return lambda dtype: list(range(R)) if condition * torch.finfo(dtype).eps < 0.2 else None


CASES = [
    *(Case(f"condition-1e{k}", lambda g, k=k: conditioned(g, 10.0**k), to_the_edge(10.0**k)) for k in range(9)),
    Case("square", lambda g: normal(g, B, R, R), to_the_edge(1e3)),
    Case("duplicates", duplicates, without(5, 9, 11, R - 1)),
    Case("crowd", crowd, lambda _: [0, R - 1]),
    Case("rank-1", lambda g: normal(g, B, M, 1) @ normal(g, B, 1, R), first(1)),
    Case("rank-6", lambda g: normal(g, B, M, 6) @ normal(g, B, 6, R), first(6)),
    Case("zero", lambda g: torch.zeros(B, M, R, dtype=torch.float64), first(0)),
    Case("zero-columns", with_zeros, without(0, 7)),
    Case("towering-column", towering, every),
    Case("huge", lambda g: normal(g, B, M, R) * 5e37, every),
    Case("denormal", lambda g: normal(g, B, M, R) * 1e-38, every, (torch.float32, torch.float64)),
    Case("wide", lambda g: normal(g, B, 9, R), first(9), (torch.float32, torch.float64)),
    Case("one-row", lambda g: normal(g, B, 1, R), first(1)),
    Case("odd", lambda g: normal(g, 1, 257, 127)[:, :, :R] + 0.1, every),
]
EACH = [(case, dtype) for case in CASES for dtype in case.dtypes]
IDS = [f"{case.name}-{str(dtype).removeprefix('torch.')}" for case, dtype in EACH]

# --- the oracle -------------------------------------------------------------------------------------------------------

Wide = np.ndarray


def wide(x: Tensor) -> Wide:
    return x.detach().double().numpy().astype(np.longdouble)


def gram_schmidt(y: Wide) -> Wide:
    """Orthonormal columns of one matrix of full column rank, by Gram-Schmidt done twice, in long double."""
    q = np.zeros_like(y)
    for j in range(y.shape[1]):
        v = y[:, j] / np.abs(y[:, j]).max()
        for _ in range(3):
            v = v - q[:, :j] @ (q[:, :j].T @ v)
            v = v / np.sqrt(v @ v)
        q[:, j] = v
    return q


def sine(p: Tensor, y: Tensor) -> float:
    """The sine of the largest angle between the column spaces of P and Y (m, k), up to a factor sqrt(k)."""
    if y.shape[1] == 0:
        return 0.0
    basis, truth = gram_schmidt(wide(p)), gram_schmidt(wide(y))
    rest = truth - basis @ (basis.T @ truth)
    return float(np.sqrt((rest * rest).sum()))


def skew(p: Tensor) -> float:
    """max |PᵀP - I| over the columns of one P (m, r) that are not zero."""
    kept = wide(p[:, (p != 0).any(0)])
    return float(np.abs(kept.T @ kept - np.eye(kept.shape[1])).max(initial=0.0))
