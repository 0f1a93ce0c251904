"""Orthonormal columns of thin factors by Cholesky QR, in as many passes as the condition needs; no LAPACK.

    G = PᵀP,   XᵀGX = I with X upper triangular,   P <- P X                 one pass; P = Y at first

Y, P (k, r), G, X (r, r). Only G needs all rows of Y, so a Y whose rows are sharded costs a sum of r² numbers per pass.
All factors of one rank take a pass together, whatever their rows: only their Grams are stacked.

The result is that of `orthoshard.linalg.cholesky`: P is what QR with R_jj > 0 gives, and a column that is within
its error of the columns before it is zero. The letters are those of `linalg.gram` and `linalg.dependent`, which explain
how columns are judged; the constants are theirs, too (tests/jax/test_orthonormal.py compares them). JAX has no float64
by default, so a Gram is never wider than its factor: a column too close to those before it waits, projected, for the
new Gram of the next pass.

`jnp.linalg.qr` of a sharded Y gathers it whole, and jaxlib's batched LAPACK Cholesky waits on the pool that it runs on:
two at once never end on two cores (jaxlib 0.10). So triangles are inverted by products and eliminations of our own.
May import jax and `axes`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .axes import Thin

MAX_ORTHOGONALITY_ERROR = 32  # P is accepted when rounding predicts no entry of PᵀP - I above this many eps
APPLIED = 0.3  # an entry of PᵀP - I that comes from rounding in P X, in eps for each unit of |X_j|
VANISHING = 2.0**-50  # a shorter column counts as zero: squares must be normal numbers
ROUNDINGS = {"float32": 8.0, "float64": 33.0}  # the relative error of a column, in eps
ROUNDS = 2  # in which a Gram judges columns that may depend on others
MOST_PASSES = 12
CLOSING_PASS = 5  # from this pass on, columns that are still open become zero instead of waiting for the next pass
BLOCK = 32  # smaller triangles are inverted row by row

_dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Request(NamedTuple):
    """A request for orthonormal columns of Y, whose entries are of size about 1. Columns no longer than ``noise`` times
    the longest, and directions that such errors could have made, become zero."""

    Y: Array
    thin: Thin
    noise: float


def orthonormal(requests: Sequence[Request]) -> list[Array]:
    """Return P for each request. Requests of one rank, dtype and batch take their passes together."""
    answers: list[Any] = [None] * len(requests)
    groups: dict[Any, list[int]] = {}
    for number, (Y, thin, _) in enumerate(requests):
        batch = tuple(Y.shape[thin.letters.index(x)] for x in thin.batch)
        groups.setdefault((Y.dtype.name, Y.shape[thin.rank_axis], batch), []).append(number)
    for members in groups.values():
        for number, P in zip(members, _together([requests[number] for number in members]), strict=True):
            answers[number] = P
    return answers


class _Passes(NamedTuple):
    """The state between two passes: squared errors of the columns of P, (g, batch..., r),
    and which matrices are done."""

    P: tuple[Array, ...]
    noise: Array
    done: Array
    number: Array


def _together(requests: Sequence[Request]) -> Sequence[Array]:
    thins = [request.thin for request in requests]
    Y = tuple(request.Y for request in requests)
    shares = jnp.asarray([request.noise for request in requests], Y[0].dtype)

    def one_pass(at: _Passes) -> _Passes:
        G = jnp.stack([thin.gram(P) for thin, P in zip(thins, at.P, strict=True)])
        floor = shares.reshape(-1, *(1,) * (G.ndim - 2))
        first = jnp.square(_column_noise(jnp.sqrt(_diagonal(G)), floor))
        factor = _factor(_unit(G, jnp.where(at.number == 0, first, at.noise)), closing=at.number >= CLOSING_PASS)
        done = at.done[..., None]
        X = jnp.where(done[..., None], jnp.eye(G.shape[-1], dtype=G.dtype), factor.X)
        P = tuple(thin.times(P, x) for thin, P, x in zip(thins, at.P, X, strict=True))
        return _Passes(P, jnp.where(done, at.noise, factor.noise), at.done | factor.done, at.number + 1)

    def more(at: _Passes) -> Array:
        return ~at.done.all() & (at.number < MOST_PASSES)

    batch = tuple(Y[0].shape[thins[0].letters.index(x)] for x in thins[0].batch)
    noise = jnp.zeros((len(Y), *batch, Y[0].shape[thins[0].rank_axis]), Y[0].dtype)
    return lax.while_loop(more, one_pass, _Passes(Y, noise, jnp.zeros(noise.shape[:-1], bool), jnp.asarray(0))).P


class _Unit(NamedTuple):
    """A Gram matrix with columns at length 1; a column that is zero, or noise, is one of I."""

    A: Array  # (..., r, r)
    live: Array  # (..., r)
    lengths: Array  # (..., r): 1 / |Y_j|, or 0
    noise: Array  # (..., r): the squared errors of the columns of Y D
    error: Array  # (..., 1): the error of A: its own rounding and the factor's


class _Factor(NamedTuple):
    X: Array  # (..., r, r), upper triangular; Y is multiplied by it
    noise: Array  # (..., r): the squared errors of the columns of Y X
    done: Array  # (...): whether Y X is as orthonormal as its dtype allows


class _Rounds(NamedTuple):
    """The state between two rounds on one Gram matrix."""

    X: Array
    columns: Array  # (..., r): the columns that X is for, or will be
    plain: Array  # (...): whether the first X, without a ridge, was good enough
    settled: Array  # (...)
    number: Array


def _column_noise(norms: Array, floor: Array) -> Array:
    """Return the error of each column, from its norm (..., r): rounding, or the share ``floor`` of the longest."""
    eps = float(jnp.finfo(norms.dtype).eps)
    rounding = jnp.where(norms > VANISHING, norms * (ROUNDINGS[norms.dtype.name] * eps), VANISHING)
    return jnp.maximum(rounding, floor * norms.max(-1, keepdims=True))


def _unit(G: Array, noise: Array) -> _Unit:
    squares = _diagonal(G)
    live = ~(squares <= noise)  # written like this, NaN counts as live and shows in the result
    lengths = jnp.where(live, lax.rsqrt(jnp.where(live, squares, 1)), 0)
    A = jnp.where(jnp.eye(G.shape[-1], dtype=bool), 1, G * (lengths[..., :, None] * lengths[..., None, :]))
    error = 4 * float(jnp.finfo(G.dtype).eps) * jnp.sqrt(jnp.square(A).sum((-2, -1)))[..., None]
    return _Unit(A, live, lengths, noise * jnp.square(lengths), error)


def _factor(unit: _Unit, closing: Array) -> _Factor:
    """Return X for a G that may be singular. A column that the rounds leave open is *deferred*: it becomes what
    its projection on the columns before leaves of it, not normalized, for the next pass to judge; if
    ``closing``, it becomes zero."""
    eps = float(jnp.finfo(unit.A.dtype).eps)
    at = _rounds(unit, eps)
    within, rest, blur = _projected(unit, at.X)
    deferred = unit.live & ~at.columns & (jnp.maximum(rest, 8 * unit.error) > blur) & ~closing
    X = jnp.where(deferred[..., None, :], jnp.eye(at.X.shape[-1], dtype=at.X.dtype) - within, at.X)
    amplification = jnp.square(X).sum(-2).max(-1)
    error = jnp.where(at.plain, eps, unit.error[..., 0])
    skew = amplification * error + APPLIED * eps * jnp.sqrt(amplification)
    done = ~(skew > MAX_ORTHOGONALITY_ERROR * eps) & ~deferred.any(-1)  # NaN counts as done: no pass would mend it
    return _Factor(X * unit.lengths[..., :, None], _carried(X, unit.noise), done)


def _rounds(unit: _Unit, eps: float) -> _Rounds:
    """Return X of the columns that can be trusted, zero for the others.

    0      X of all, without a ridge; good enough for most
    odd    X of all that are not set aside, with a ridge: those that are longer than their error stay
    even   X of those that stayed: others that these do not show to be dependent are judged again
    """
    room = 4 * (1 + unit.A.shape[-1] ** 0.5)

    def look(at: _Rounds) -> _Rounds:
        plain, odd, last = at.number == 0, at.number % 2 == 1, at.number == 2 * ROUNDS
        X = inverse_factor(_among(unit, at.columns, jnp.where(plain, 0, unit.error))) * at.columns[..., None, :]
        noise, squares = _carried(X, unit.noise), jnp.square(X).sum(-2)
        good = plain & (noise < 1).all(-1) & (squares.max(-1) * (eps * room) < 1)
        sound = at.columns & (noise < 1) & (squares * (8 * unit.error) < 1)
        _, rest, blur = _projected(unit, X)
        again = at.columns | (unit.live & (rest > jnp.maximum(8 * unit.error, blur)))
        final = good | (~plain & ~odd & (last | (again == at.columns).all(-1)))
        columns = jnp.where(odd, sound, jnp.where(plain | final[..., None], at.columns, again))
        return _Rounds(
            jnp.where(at.settled[..., None, None], at.X, X),
            jnp.where(at.settled[..., None], at.columns, columns),
            at.plain | good,
            at.settled | final,
            at.number + 1,
        )

    none = jnp.zeros(unit.live.shape[:-1], bool)
    start = _Rounds(jnp.zeros_like(unit.A), unit.live, none, none, jnp.asarray(0))
    return lax.while_loop(lambda at: ~at.settled.all() & (at.number <= 2 * ROUNDS), look, start)


def _among(unit: _Unit, columns: Array, ridge: Array) -> Array:
    """Return A with all but these columns (..., r) set aside, and a ridge that keeps every pivot above rounding."""
    eye = jnp.eye(unit.A.shape[-1], dtype=unit.A.dtype)
    return jnp.where(columns[..., :, None] & columns[..., None, :], unit.A, eye) + ridge[..., None] * eye


def _projected(unit: _Unit, X: Array) -> tuple[Array, Array, Array]:
    """Return for each column of Y D: the coefficients (..., r, r) of its projection on the columns of Y D X before it;
    the square of what remains, (..., r); and the squared error of that, (..., r)."""
    onto = jnp.triu(_dot(jnp.matrix_transpose(X), unit.A), 1)
    within = _dot(X, onto)
    return within, 1 - jnp.square(onto).sum(-2), unit.noise + _carried(within, unit.noise)


def _carried(X: Array, noise: Array) -> Array:
    """Return sum_i X_ij² noise_i, (..., r)."""
    return (jnp.square(X) * noise[..., :, None]).sum(-2)


def _diagonal(G: Array) -> Array:
    return jnp.diagonal(G, axis1=-2, axis2=-1)


def inverse_factor(G: Array) -> Array:
    """Return X = R⁻¹ for G = RᵀR (..., r, r), computed by halves, so that nearly all the work is products:

        G = [G11 G12]    X11 from G11,  B = X11ᵀ G12,  X22 from G22 - BᵀB,  X12 = -X11 B X22
            [ .  G22]

    From the first column on at which G is not positive definite, X is NaN. No matrix affects another.
    """
    r = G.shape[-1]
    if r <= BLOCK:
        return _eliminated(G)
    h = -(-r // 16) * 8  # half of r, rounded up to a multiple of 8
    X11 = inverse_factor(G[..., :h, :h])
    B = _dot(jnp.matrix_transpose(X11), G[..., :h, h:])
    X22 = inverse_factor(G[..., h:, h:] - _dot(jnp.matrix_transpose(B), B))
    upper = jnp.concatenate([X11, -_dot(X11, _dot(B, X22))], -1)
    lower = jnp.concatenate([jnp.zeros((*G.shape[:-2], r - h, h), G.dtype), X22], -1)
    return jnp.concatenate([upper, lower], -2)


@jax.jit
def _eliminated(G: Array) -> Array:
    """Return the same for a small G, column by column: XᵀGX = D, then X D^-½."""
    r = G.shape[-1]
    later = jnp.arange(r)

    def step(j: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        A, X = pair
        column, own = lax.dynamic_index_in_dim(A, j, -1), lax.dynamic_index_in_dim(X, j, -1)
        pivot = lax.dynamic_index_in_dim(column, j, -2)
        pivot = jnp.where(pivot > 0, pivot, jnp.nan)
        row = jnp.where(later > j, lax.dynamic_index_in_dim(A, j, -2) / pivot, 0)
        return A - column * row, X - own * row

    A, X = lax.fori_loop(0, r, step, (G, jnp.broadcast_to(jnp.eye(r, dtype=G.dtype), G.shape)))
    pivots = _diagonal(A)
    return X * lax.rsqrt(jnp.where(pivots > 0, pivots, jnp.nan))[..., None, :]
