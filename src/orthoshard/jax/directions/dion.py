"""Dion: distributed orthonormalized updates (Ahn, Xu, Abreu, Langford, arXiv 2504.05295, v3 Algorithm 1), for optax.

    M += G
    P  = orthonormal(Mᵀ Q)
    R  = M P
    M -= (1 - momentum) R Pᵀ            error feedback: what rank r did not capture stays
    Q  = R / (column norms of R)
    U  = Q Pᵀ                           W = (1 - lr wd) W - lr s U

W, M, U (m, n), m = d_out, n = d_in; Q, R (m, r); P (n, r); r = ceil(rank_fraction min(m, n)). Q spans the rows, as in
the torch library; with ``q_side="columns"`` M is read as Mᵀ throughout. May import jax and this room.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array

from ..orthonormal import Request
from ..scaled import Scaled
from .proposal import Direction, Proposal, noise_of


@dataclass(frozen=True)
class Dion:
    """The direction, with its state Q."""

    q_side: Literal["rows", "columns"] = "rows"

    def propose(self, N: Scaled, Q: Array) -> Direction:
        return (yield from _propose(N.transposed if self.q_side == "columns" else N, Q))


def _propose(N: Scaled, Q: Array) -> Direction:
    noise = noise_of(N)
    P = yield Request(N.transposed_times(Q), N.axes.column_factor, noise)
    R = N.times(P)
    norms = jnp.sqrt(N.axes.over_rows(jnp.square(R)))
    live = norms > noise * norms.max(N.axes.row_factor.rank_axis, keepdims=True)
    V = jnp.where(live, R / jnp.where(live, norms, 1), 0)
    return Proposal(N.published(V, P), N.captured(R, P), jnp.where(live, V, Q))
