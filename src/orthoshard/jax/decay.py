"""How far weights move and how they decay; decoupled decay itself is `optax.add_decayed_weights`.

    cautious       W -= lr wd W if U W >= 0, entry by entry                                (arXiv 2510.12402)
    hyperball      W <- (|W_0| / |W|) W - lr |W_0| U / |U|; no other decay                 (MuonH, arXiv 2606.16899)
    update_floor   if |U| < tau |W|: U <- U tau |W| / |U|, before lr                       (modded-nanogpt, track 3)

W, U (m, n), U with the factor of its shape; norms are Frobenius, of one matrix. May import jax, optax and this room.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from .axes import MatrixAxes
from .transform import axes_of


def add_cautious_decay(weight_decay: Any) -> optax.GradientTransformation:
    """Apply decoupled weight decay to those entries of an update that it does not oppose: U + wd W if U W >= 0.

    Use it in place of `optax.add_decayed_weights`, before the learning rate. Cautious weight decay, arXiv 2510.12402.
    """

    def one(U: Array, W: Array) -> Array:
        return U + jnp.where(U * W >= 0, weight_decay * W, 0).astype(U.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(one, updates, _given(params, "cautious decay")), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def update_floor(least: Any, *, dimension_numbers: Any = None) -> optax.GradientTransformation:
    """Lengthen the update of a matrix if ``|U|_F < least |W|_F``.

    Use it after a direction, before decay and the learning rate. ``dimension_numbers`` as for `scale_by_dion`.
    """

    def one(U: Array, W: Array, axes: MatrixAxes) -> Array:
        taken, wanted = _norm(U, axes), least * _norm(W, axes)
        short = (taken > 0) & (taken < wanted)
        return U * jnp.where(short, wanted / jnp.where(short, taken, 1), 1).astype(U.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return _each(one, dimension_numbers, updates, _given(params, "update_floor")), state

    return optax.GradientTransformation(optax.init_empty_state, update)


class HyperballState(NamedTuple):
    """|W_0|_F of each matrix, and the state of the learning rate."""

    radius: Any
    learning_rate: Any


def hyperball(learning_rate: optax.ScalarOrSchedule, *, dimension_numbers: Any = None) -> optax.GradientTransformation:
    """Hold the Frobenius norm of each matrix: take steps of relative length lr along its sphere, with no decay.

    Use it in place of `optax.scale_by_learning_rate`, after a direction. The norm is corrected one step late: it is off
    the initial norm by one step, O(lr). ``dimension_numbers`` as for `scale_by_dion`. arXiv 2606.16899.

    Raises ValueError at ``init`` if a matrix is zero, which has no sphere (unless parameters are traced).
    """
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: Any) -> HyperballState:
        radii = _each(_norm, dimension_numbers, params)
        for radius in jax.tree.leaves(radii):
            if not isinstance(radius, Tracer) and bool((radius == 0).any()):
                raise ValueError('decay="hyperball" holds the norm of each matrix, and one is zero; start it elsewhere')
        return HyperballState(radii, rate.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HyperballState]:
        step, count = _rate(rate, state.learning_rate)

        def one(U: Array, W: Array, radius: Array, axes: MatrixAxes) -> Array:
            moved = radius / _positive(_norm(W, axes)) * W - step * radius / _positive(_norm(U, axes)) * U
            return (moved - W).astype(U.dtype)

        steps = _each(one, dimension_numbers, updates, _given(params, "hyperball"), state.radius)
        return steps, HyperballState(state.radius, count)

    return optax.GradientTransformation(init, update)


def _rate(rate: optax.GradientTransformation, state: Any) -> tuple[Any, Any]:
    """Return the learning rate of this step, read from the transformation that multiplies by it, and its next state."""
    step, state = rate.update(jnp.full((), -1.0), state)
    return step, state


def _each(f: Any, dimension_numbers: Any, updates: Any, *trees: Any) -> Any:
    """Apply f to each leaf, to the leaves of the other trees at the same place, and to its axes."""
    leaves, structure = jax.tree.flatten(updates)
    others = (structure.flatten_up_to(tree) for tree in trees)
    axes = axes_of(updates, dimension_numbers)
    return structure.unflatten(f(*each) for each in zip(leaves, *others, axes, strict=True))


def _norm(W: Array, axes: MatrixAxes) -> Array:
    wide = W.astype(jnp.promote_types(W.dtype, jnp.float32))
    return jnp.sqrt(axes.over_matrix(jnp.square(wide)))


def _positive(norm: Array) -> Array:
    return jnp.where(norm > 0, norm, 1)


def _given(params: Any, who: str) -> Any:
    if params is None:
        raise ValueError(f"{who} needs the parameters: call update(gradients, state, params)")
    return params
