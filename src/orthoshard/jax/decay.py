"""What becomes of the weights: decoupled decay where it agrees with the update, or a norm that is held.

    cautious    W -= lr wd W where U W >= 0, entry by entry             (cautious weight decay, arXiv 2510.12402)
    hyperball   W' = W - lr |W|_F U / |U|_F, then back to |W_0|_F      (arXiv 2606.16899)

Decoupled decay itself is `optax.add_decayed_weights`. W, U (m, n). May import jax, optax and this room.
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
    """Decoupled weight decay on those entries of an update that it does not oppose: U + wd W where U W >= 0.

    In the place of `optax.add_decayed_weights`, before the learning rate. Cautious weight decay, arXiv 2510.12402.
    """

    def one(U: Array, W: Array) -> Array:
        return U + jnp.where(U * W >= 0, weight_decay * W, 0).astype(U.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(one, updates, _given(params, "cautious decay")), state

    return optax.GradientTransformation(optax.init_empty_state, update)


class HyperballState(NamedTuple):
    """|W_0|_F of each matrix, and the state of the learning rate."""

    radius: Any
    learning_rate: Any


def hyperball(learning_rate: optax.ScalarOrSchedule, *, dimension_numbers: Any = None) -> optax.GradientTransformation:
    """Hold the Frobenius norm of each matrix: steps of relative length lr on its sphere, with no decay.

    In the place of `optax.scale_by_learning_rate`, behind a direction. ``dimension_numbers`` as for `scale_by_dion`.
    arXiv 2606.16899.

    Raises ValueError at ``init`` where a matrix is zero, which has no sphere (not where parameters are traced).
    """
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: Any) -> HyperballState:
        leaves, structure = jax.tree.flatten(params)
        radii = [_norm(W, ax) for W, ax in zip(leaves, axes_of(params, dimension_numbers), strict=True)]
        for radius in radii:
            if not isinstance(radius, Tracer) and bool((radius == 0).any()):
                raise ValueError('decay="hyperball" holds the norm of each matrix, and one is zero; start it elsewhere')
        return HyperballState(structure.unflatten(radii), rate.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HyperballState]:
        leaves, structure = jax.tree.flatten(updates)
        axes = axes_of(updates, dimension_numbers)
        weights = structure.flatten_up_to(_given(params, "hyperball"))
        relative = [
            U * (_norm(W, ax) / _positive(_norm(U, ax))).astype(U.dtype)
            for U, W, ax in zip(leaves, weights, axes, strict=True)
        ]
        scaled, count = rate.update(structure.unflatten(relative), state.learning_rate, params)
        moved = zip(jax.tree.leaves(scaled), weights, structure.flatten_up_to(state.radius), axes, strict=True)
        steps = [_onto_sphere(u, W, radius, ax) for u, W, radius, ax in moved]
        return structure.unflatten(steps), HyperballState(state.radius, count)

    return optax.GradientTransformation(init, update)


def _onto_sphere(u: Array, W: Array, radius: Array, axes: MatrixAxes) -> Array:
    dtype = jnp.promote_types(W.dtype, jnp.float32)
    wide = W.astype(dtype)
    moved = wide + u.astype(dtype)
    return (moved * (radius / _positive(_norm(moved, axes))) - wide).astype(u.dtype)


def _norm(W: Array, axes: MatrixAxes) -> Array:
    wide = W.astype(jnp.promote_types(W.dtype, jnp.float32))
    return jnp.sqrt(axes.over_matrix(jnp.square(wide)))


def _positive(norm: Array) -> Array:
    return jnp.where(norm > 0, norm, 1)


def _given(params: Any, who: str) -> Any:
    if params is None:
        raise ValueError(f"{who} needs the parameters: call update(gradients, state, params)")
    return params
