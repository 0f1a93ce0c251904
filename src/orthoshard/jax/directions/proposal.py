"""What a direction returns, and what directions agree on. May import jax, `orthonormal` and `scaled`."""

from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..orthonormal import Request
from ..scaled import Scaled

NOISE = 4.0  # a column of a product is noise below this many roundings times sqrt(max(m, n)) of the longest


class Proposal(NamedTuple):
    """What a direction returns. ``spent``: what it captured of N, which error feedback takes out of the momentum;
    ``basis``: the next Q."""

    update: Array  # U (m, n)
    spent: Any = None
    basis: Any = None


Direction = Generator[Request, Array, Proposal]


def noise_of(N: Scaled) -> float:
    """Return the share of the longest column below which a column of a product with N is rounding."""
    return NOISE * float(jnp.finfo(N.N.dtype).eps) * max(N.axes.m, N.axes.n) ** 0.5
