"""DionTail: Dion with its remainder applied at once, the rows at one length, in place of error feedback; for optax.

    B = mu B + G
    N = G + mu B   (Nesterov)   or   B
    P = orthonormal(Nᵀ Q)
    R = N P                                 R Pᵀ is what rank r captures of N
    V = orthonormal(R)                      V Pᵀ, its orthonormal part; V is the next Q
    E = N - R Pᵀ                            the tail, never formed: |E_i|² = |N_i|² - |R_i|²
    D = diag(c sqrt((d - r) / m) / |E_i|)
    U = V Pᵀ + D E = (V - D R) Pᵀ + D N     W = (1 - lr wd) W - lr s U

W, B, N, E, U (m, n); Q, R, V (m, r); P (n, r); d = min(m, n); r = ceil(rank_fraction d); c the tail weight.
See docs/rules.md. May import jax and this room.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..orthonormal import Request
from ..scaled import Scaled
from .proposal import Direction, Proposal, noise_of

CANCELLATION = 32.0  # |N_i|² - |R_i|² is off by about this many roundings of |N_i|²


@dataclass(frozen=True)
class DionTail:
    """The direction, with its state Q. ``tail_weight`` is c; 0 leaves a Dion without error feedback."""

    tail_weight: Any = 1.0

    def propose(self, N: Scaled, Q: Array) -> Direction:
        axes, noise = N.axes, noise_of(N)
        P = yield Request(N.transposed_times(Q), axes.column_factor, noise)
        R = N.times(P)
        V = yield Request(R, axes.row_factor, noise)
        lengths = axes.over_columns(jnp.square(N.entries))
        tail = lengths - axes.over_columns(jnp.square(R))
        # a tail counts if it is above rounding of its own row, and above rounding of the mean row
        eps = float(jnp.finfo(N.N.dtype).eps)
        least = jnp.maximum(CANCELLATION * eps * lengths, noise**2 / axes.m * axes.over_rows(lengths))
        r = R.shape[axes.row_factor.rank_axis]
        weight = self.tail_weight * ((axes.d - r) / axes.m) ** 0.5
        D = jnp.where(tail > least, weight * lax.rsqrt(jnp.where(tail > least, tail, 1)), 0)
        live = axes.over_rows(jnp.square(V)) > 0.5
        return Proposal(N.outer(V - D * R, P) + D * N.entries, None, jnp.where(live, V, Q))
