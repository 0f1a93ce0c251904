"""What rules of one amortized power iteration a step share: their options, their rank, and what counts as noise.

    P = orthonormal(X Q)        X (b, p, q), Q (b, q, r) from the last step; r = ceil(rank_fraction min(m, n))

Directions below rounding noise have a zero column in P, so they do not move the weights, and keep their column of
Q, so that they can come back when the gradient does. May import torch, `linalg` and this room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..linalg.orthonormal import WORK
from ..linalg.products import PRECISIONS, Precision
from ..linalg.small import Work
from .rule import SCALES, STATE_DTYPES, Rule, fraction, one_of

# A column whose norm is this many roundings of the longest column is noise. A product of inner length q rounds by about
# eps sqrt(q) a column when its terms are of one size (bfloat16 is summed in float32); 4 leaves room for terms that are
# not.
NOISE = 4.0
# Operands rounded to 8 or 11 bits are off by up to this much an entry, a product's columns by no more of the longest
# one, since |X|_F / sqrt(q) is below the norm of X.
ROUNDED: dict[str, float] = {"bfloat16": 2.0**-9, "tf32": 2.0**-12}


@dataclass(frozen=True)
class LowRankRule(Rule):
    """Options of rules that keep a basis Q of rank r for each matrix; defaults as in Dion's paper (v3, section 4)."""

    lr: float | Tensor = 0.02
    weight_decay: float | Tensor = 0.01
    momentum: float = 0.95
    rank_fraction: float = 0.25
    rank_multiple_of: int = 1
    scale: str = "spectral"
    orthonormal: str = "cholesky_qr"
    state_dtype: str | None = None
    matmul_precision: Precision | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("momentum", self.momentum, zero=True, one=False)
        fraction("rank_fraction", self.rank_fraction, zero=False, one=True)
        if not isinstance(self.rank_multiple_of, int) or self.rank_multiple_of < 1:
            raise ValueError(f"rank_multiple_of={self.rank_multiple_of!r} must be a whole number, 1 or larger")
        one_of("scale", self.scale, list(SCALES))
        one_of("orthonormal", self.orthonormal, list(WORK))
        one_of("state_dtype", self.state_dtype, (None, *STATE_DTYPES))
        one_of("matmul_precision", self.matmul_precision, (None, *PRECISIONS))

    def rank(self, m: int, n: int) -> int:
        """r = ceil(rank_fraction · min(m, n)), rounded up to ``rank_multiple_of``, at most min(m, n)."""
        r = math.ceil(self.rank_fraction * min(m, n))
        return min(-(-r // self.rank_multiple_of) * self.rank_multiple_of, m, n)

    def orthonormalize(self, noise: float) -> partial[Work]:
        """What `Each` gets: orthonormal columns, in the dtype of what it is given; those below ``noise`` of the longest
        are zero."""
        return partial(_orthonormal, WORK[self.orthonormal], noise)


def noise_of(dtype: torch.dtype, shape: tuple[int, ...], precision: Precision | None) -> float:
    """The share of the longest column below which a column of a product with such a matrix, held in ``dtype`` and
    multiplied in ``precision``, is rounding."""
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return max(NOISE * eps * math.sqrt(max(shape)), 2 * rounding_of(dtype, precision))


def rounding_of(dtype: torch.dtype, precision: Precision | None) -> float:
    """By what share operands in ``dtype`` are rounded before a product in ``precision``; 0 where they are not."""
    return ROUNDED[precision] if precision in ROUNDED and dtype == torch.float32 else 0.0


def _orthonormal(method: Callable[[Tensor, float], Work], noise: float, Y: Tensor) -> Work:
    return (yield from method(Y, noise)).to(Y.dtype)
