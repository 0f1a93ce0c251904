"""What stands round a direction: momentum, equilibration, evening out of rows, the factor of the shape.

    momentum       M = mu M + G,  N = G + mu M (Nesterov) or M;   under error feedback M += G, N = M
    equilibrate    N -> S N, S rows at length 1 (MuonEq-R, arXiv 2603.28254), columns, or both at once
    row moment     v = b2 v + (1 - b2) mean_j U_ij²,  U -> U / sqrt(v), back to |U|_F (NorMuon, arXiv 2510.05491)
    scale          U -> s U, s from the shape

M, N, G, U (m, n); v (m). What becomes of the weights is in `decay`. May import jax, `axes` and `scaled`.
"""

import math
from collections.abc import Callable
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
}
EQUILIBRATIONS = ("rows", "columns", "both")
LEAST_MOMENT = 1e-10  # of v, as NorMuon's authors have it
VANISHING = 2.0**-50  # rows that are shorter, beside the largest entry, are zero


def accumulate(old: Array, G: Array, mu: Any, nesterov: bool, error_feedback: bool) -> tuple[Array, Array]:
    """The new M and N."""
    M = old + G if error_feedback else mu * old + G
    return M, G + mu * M if nesterov else M


def equilibrate(N: Scaled, kind: str | None) -> tuple[Scaled, Array | float]:
    """S N, and S as it stands beside N."""
    if kind is None:
        return N, 1.0
    X = N.entries
    squares = jnp.square(X)
    rows = _inverse_lengths(N.axes.over_columns(squares)) if kind in ("rows", "both") else 1.0
    columns = _inverse_lengths(N.axes.over_rows(squares)) if kind in ("columns", "both") else 1.0
    S = rows * columns
    return Scaled(S * X, N.axes, N.placement, N.precision), S


def _inverse_lengths(squares: Array) -> Array:
    live = squares > VANISHING**2
    return jnp.where(live, lax.rsqrt(jnp.where(live, squares, 1)), 0)


def even_rows(U: Array, v: Array, beta2: Any, axes: MatrixAxes) -> tuple[Array, Array]:
    """U with its rows evened out by a running mean of their squares, and that mean, (m, 1) beside W."""
    squares = axes.over_columns(jnp.square(U))
    v = beta2 * v + (1 - beta2) * squares / axes.n
    f = lax.rsqrt(jnp.maximum(v, LEAST_MOMENT))
    before, after = axes.over_rows(squares), axes.over_rows(jnp.square(f) * squares)
    return U * f * jnp.sqrt(before / jnp.where(after > 0, after, 1)), v
