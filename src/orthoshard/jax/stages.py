"""What surrounds a direction: momentum, equilibration, evening out of rows, the factor of the shape.

    momentum       M = mu M + G,  N = G + mu M (Nesterov) or M;   under error feedback M += G, N = M
    equilibrate    N -> diag(s) N diag(c):  s_i = 1 / |N_i| (MuonEq-R, arXiv 2603.28254), c_j = 1 / |N_·j|, or both,
                   square roots of these
    row moment     v = b2 v + (1 - b2) mean_j U_ij²,  U -> U / sqrt(v), back to |U|_F (NorMuon, arXiv 2510.05491)
    frobenius      U -> sqrt(d) U / |U|_F,  d = min(m, n)                             (Muon+, arXiv 2602.21545)
    scale          U -> s U, s from the shape

M, N, G, U (m, n); v (m). How weights move is in `decay`. May import jax, `axes` and `scaled`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .axes import MatrixAxes
from .scaled import Scaled

# The factor of the update of an (m, n) = (d_out, d_in) matrix.
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(m / n),  # Dion, arXiv 2504.05295 v3, Table 1
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # K. Jordan's Muon, 2024
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight, arXiv 2502.16982: the RMS of AdamW's updates
    "none": lambda m, n: 1.0,  # microsoft/dion's adjust_lr=None
}
EQUILIBRATIONS = ("rows", "columns", "both")
LEAST_MOMENT = 1e-10  # the least v, as in NorMuon's code


def accumulate(old: Array, G: Array, mu: Any, nesterov: bool, error_feedback: bool) -> tuple[Array, Array]:
    """Return the new M and N."""
    M = old + G if error_feedback else mu * old + G
    return M, G + mu * M if nesterov else M


def equilibrate(N: Scaled, kind: str | None) -> Scaled:
    """Bring rows, columns or both of N to one length; what is zero stays zero."""
    if kind is None:
        return N
    squares = jnp.square(N.entries)
    root = jnp.sqrt if kind == "both" else lambda x: x
    rows = 1.0 if kind == "columns" else root(_inverse_lengths(N.axes.over_columns(squares)))
    columns = 1.0 if kind == "rows" else root(_inverse_lengths(N.axes.over_rows(squares)))
    return replace(N, rows=rows, columns=columns)


def _inverse_lengths(squares: Array) -> Array:
    live = squares >= jnp.finfo(squares.dtype).tiny
    return jnp.where(live, lax.rsqrt(jnp.where(live, squares, 1)), 0)


def even_rows(U: Array, v: Array, beta2: Any, axes: MatrixAxes) -> tuple[Array, Array]:
    """Even out the rows of U by a running mean of their squares. Return U and that mean, (m, 1) with the axes of W; a
    row that does not move keeps its mean."""
    squares = axes.over_columns(jnp.square(U))
    v = jnp.where(squares > 0, v + (1 - beta2) * (squares / axes.n - v), v)
    f = lax.rsqrt(jnp.maximum(v, LEAST_MOMENT))
    before, after = axes.over_rows(squares), axes.over_rows(jnp.square(f) * squares)
    return U * f * jnp.sqrt(before / jnp.where(after > 0, after, 1)), v


def frobenius(U: Array, axes: MatrixAxes) -> Array:
    """Bring U to Frobenius norm sqrt(d)."""
    square = axes.over_matrix(jnp.square(U))
    return U * jnp.sqrt(axes.d / jnp.where(square > 0, square, 1))
