"""What directions with one power iteration per step share: their options, their rank, and what counts as noise.

    P = orthonormal(X Q)        X (b, p, q), Q (b, q, r) from the last step; r = ceil(rank_fraction min(m, n))

Directions below rounding noise have a zero column in P, so they do not move the weights. They keep their column of
Q, so that they can come back when the gradient does. May import torch, `linalg`, `checks` and this room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checks import fraction, one_of
from ..linalg.cholesky import cholesky_qr_work
from ..linalg.host_sync import device_type
from ..linalg.products import PRECISIONS, Precision, resolved
from ..linalg.small import Work
from .direction import Direction

# A column whose norm is this many roundings of the longest column is noise. A product of inner length q rounds by about
# eps sqrt(q) a column if its terms are of one size (bfloat16 is summed in float32); 4 leaves room for terms that are
# not.
NOISE = 4.0
# Operands rounded to 8 or 11 bits are off by up to this share of each entry. A product's columns are off by no more
# than that share of the longest one, since |X|_F / sqrt(q) is below the norm of X.
ROUNDED: dict[str, float] = {"bfloat16": 2.0**-9, "tf32": 2.0**-12}


@dataclass(frozen=True)
class LowRank(Direction):
    """Options of directions that keep a basis Q of rank r for each matrix; defaults as in
    Dion's paper (v3, section 4)."""

    rank_fraction: float = 0.25
    rank_multiple_of: int = 1
    matmul_precision: Precision | None = None

    def __post_init__(self) -> None:
        fraction("rank_fraction", self.rank_fraction, zero=False, one=True)
        if not isinstance(self.rank_multiple_of, int) or self.rank_multiple_of < 1:
            raise ValueError(f"rank_multiple_of={self.rank_multiple_of!r} must be a whole number, 1 or larger")
        one_of("matmul_precision", self.matmul_precision, (None, *PRECISIONS))

    @property
    def precision(self) -> Precision | None:
        return self.matmul_precision

    def rank(self, m: int, n: int) -> int:
        """Return r = ceil(rank_fraction · min(m, n)), rounded up to ``rank_multiple_of``, at most min(m, n)."""
        r = math.ceil(self.rank_fraction * min(m, n))
        return min(-(-r // self.rank_multiple_of) * self.rank_multiple_of, m, n)

    def noise(self, N: Tensor, shape: tuple[int, ...]) -> float:
        """Return the share of the longest column below which a column of a product with N is rounding. ``shape`` is
        that of the whole matrices."""
        eps = torch.finfo(torch.promote_types(N.dtype, torch.float32)).eps
        return max(NOISE * eps * math.sqrt(max(shape)), 2 * rounding_of(N, self.matmul_precision))


def orthonormalize(noise: float) -> partial[Work]:
    """Return the function for `OnWholeMatrices` that makes columns orthonormal, in the dtype of its argument. Columns
    below ``noise`` of the longest become zero."""
    return partial(_orthonormal, noise)


def rounding_of(N: Tensor, precision: Precision | None) -> float:
    """Return the share by which entries of N are rounded before a product in ``precision``; 0 if they are not."""
    return ROUNDED.get(resolved(precision, device_type(N)), 0.0) if N.dtype == torch.float32 else 0.0


def _orthonormal(noise: float, Y: Tensor) -> Work:
    return (yield from cholesky_qr_work(Y, noise)).to(Y.dtype)
