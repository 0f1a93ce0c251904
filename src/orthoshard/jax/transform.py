"""A direction with its stages as an optax transformation of a tree of parameters.

    init     momentum like each parameter, Q of normal entries over sqrt(q) from (seed, name), zeros for row moments
    update   for each parameter: momentum, equilibrate, direction, row moment, Frobenius norm, scale; no decay

Directions are generators. They run together, so that whatever they need orthonormalized at the same point is done in
one go for all parameters. May import jax, optax and this room.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from .axes import DimensionNumbers, MatrixAxes, is_dimension_numbers, matrix_axes
from .directions import Dion, DionTail, Polar
from .orthonormal import Request, orthonormal
from .placement import Placement, in_auto_axes, made_like
from .scaled import Scaled
from .stages import SCALES, accumulate, equilibrate, even_rows, frobenius

Names = Callable[[Any], str]


class MatrixState(NamedTuple):
    """State of the matrices, each a tree like the parameters; `optax.EmptyState` if the rule keeps none."""

    momentum: Any
    Q: Any
    row_moment: Any


@dataclass(frozen=True)
class Rule:
    """A direction and its stages. Numbers may be traced, except those that decide shapes."""

    direction: Dion | DionTail | Polar
    momentum: Any = 0.95
    nesterov: bool = False
    error_feedback: bool = False
    equilibrate: str | None = None
    row_moment: Any = None
    frobenius: bool = False
    scale: str = "spectral"
    rank_fraction: float | Fraction | None = None  # None: the direction keeps no Q
    rank_multiple_of: int | None = None
    state_dtype: Any = None
    precision: Any = field(default="highest")
    shard_state: str | None = None
    replicas: int | None = None

    def rank(self, axes: MatrixAxes) -> int:
        """Return r = ceil(rank_fraction · min(m, n)), rounded up to ``rank_multiple_of``, at most min(m, n)."""
        assert self.rank_fraction is not None
        r, multiple = math.ceil(self.rank_fraction * axes.d), self.rank_multiple_of or 1
        return min(-(-r // multiple) * multiple, axes.d)

    def basis_axes(self, axes: MatrixAxes) -> MatrixAxes:
        """Return the axes whose rows Q spans."""
        columns = isinstance(self.direction, Dion) and self.direction.q_side == "columns"
        return axes.transposed if columns else axes

    def kept_dtype(self, parameter: Any) -> Any:
        return self.state_dtype or jnp.promote_types(parameter.dtype, jnp.float32)


def transformation(
    rule: Rule, dimension_numbers: Any, seed: int | None, names: Names | None, mesh: Mesh | None
) -> optax.GradientTransformation:
    """Make the transformation that applies the rule to every leaf of a tree of parameters."""

    def init(params: Any) -> MatrixState:
        paths, structure = jax.tree_util.tree_flatten_with_path(params)
        axes = axes_of(params, dimension_numbers)
        momenta: list[Array] = []
        bases: list[Array] = []
        moments: list[Array] = []
        for (path, p), ax in zip(paths, axes, strict=True):
            if not jnp.issubdtype(p.dtype, jnp.floating):
                raise ValueError(
                    f"{path_name(path) or 'the parameter'} is {p.dtype}, which no rule treats; give it to another "
                    "optimizer, by None in its place in dimension_numbers (of dion, muon, ...) or by optax.masked"
                )
            dtype = rule.kept_dtype(p)
            if rule.replicas is None:
                momenta.append(made_like(p, ax.shape, partial(_zeros, ax.shape, dtype)))
            else:
                momenta.append(jnp.zeros((rule.replicas, *ax.shape), dtype))
            if rule.rank_fraction is not None:
                basis = rule.basis_axes(ax)
                shape = basis.row_factor_shape(rule.rank(ax))
                key = _key(parameter_seed(seed or 0, (names or path_name)(path)))
                bases.append(made_like(p, shape, partial(_normal, key, shape, basis.m**-0.5, dtype)))
            if rule.row_moment is not None:
                shape = ax.row_factor_shape(1)
                moments.append(made_like(p, shape, partial(_zeros, shape, jnp.promote_types(dtype, jnp.float32))))
        return MatrixState(
            structure.unflatten(momenta),
            structure.unflatten(bases) if rule.rank_fraction is not None else optax.EmptyState(),
            structure.unflatten(moments) if rule.row_moment is not None else optax.EmptyState(),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MatrixState]:
        gradients, structure = jax.tree.flatten(updates)
        shapes = updates if rule.replicas is None else jax.tree.map(lambda g: _first(g, rule.replicas), updates)
        axes = axes_of(shapes, dimension_numbers)
        empty = [isinstance(each, optax.EmptyState) for each in state]
        kept = [
            [None] * len(gradients) if missing else structure.flatten_up_to(each)
            for each, missing in zip(state, empty, strict=True)
        ]

        def stepped(gradients: list[Array], *kept: list[Array | None]) -> list[tuple[Any, ...]]:
            placement = Placement(mesh, rule.shard_state == "zero1")
            return drive([_step(rule, ax, placement, *each) for ax, *each in zip(axes, gradients, *kept, strict=True)])

        results = in_auto_axes(stepped, list(zip(gradients, *kept, strict=True)))(gradients, *kept)
        changes, *new = (structure.unflatten([result[k] for result in results]) for k in range(4))
        new = [old if missing else each for each, old, missing in zip(new, state, empty, strict=True)]
        return changes, MatrixState(*new)

    return optax.GradientTransformation(init, update)


def _step(
    rule: Rule, axes: MatrixAxes, placement: Placement, G: Array, M: Array, Q: Array | None, v: Array | None
) -> Generator[Request, Array, tuple[Any, ...]]:
    """Take the step of one parameter. Return U s in the gradient's dtype, and its new state."""
    dtype = jnp.promote_types(M.dtype, jnp.float32)
    wide, direction = accumulate(M.astype(dtype), G.astype(dtype), rule.momentum, rule.nesterov, rule.error_feedback)
    N = Scaled(direction, axes, placement, rule.precision, rule.replicas is not None)
    thin = rule.basis_axes(axes).row_factor
    held: Any = None if Q is None else placement.whole_rank(Q.astype(dtype), thin)
    update, spent, basis = yield from rule.direction.propose(equilibrate(N, rule.equilibrate), held)
    if rule.error_feedback:
        wide = wide - (1 - rule.momentum) * spent
    moment = None
    if v is not None:
        update, moment = even_rows(update, v.astype(dtype), rule.row_moment, axes)
        moment = moment.astype(v.dtype)
    if rule.frobenius:
        update = frobenius(update, axes)
    update = (SCALES[rule.scale](axes.m, axes.n) * update).astype(G.dtype)
    return (
        update,
        wide.astype(M.dtype),
        None if Q is None else placement.whole_rank(basis, thin).astype(Q.dtype),
        moment,
    )


def drive(steps: Sequence[Generator[Request, Array, Any]]) -> list[Any]:
    """Run all steps and return their results. What they request at the same point is answered together."""
    results: list[Any] = [None] * len(steps)
    waiting: dict[int, Any] = dict.fromkeys(range(len(steps)))
    while waiting:
        asked: dict[int, Request] = {}
        for number, answer in waiting.items():
            try:
                asked[number] = steps[number].send(answer)
            except StopIteration as stop:
                results[number] = stop.value
        waiting = dict(zip(asked, orthonormal(list(asked.values())), strict=True))
    return results


def average_replicas() -> optax.GradientTransformation:
    """Take the mean of gradients (replicas, ...) over their first axis, for parameters that go to another optimizer
    while `scale_by_dion` has ``replicas``."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda g: g.mean(0), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _first(gradient: Any, replicas: int | None) -> Any:
    """Return the shape and dtype of the gradient of one replica."""
    if not gradient.ndim or gradient.shape[0] != replicas:
        raise ValueError(
            f"with replicas={replicas} a gradient has that many in front of the parameter's axes; one has shape "
            f"{gradient.shape}"
        )
    return jax.ShapeDtypeStruct(gradient.shape[1:], gradient.dtype)


def axes_of(params: Any, dimension_numbers: Any) -> list[MatrixAxes]:
    """Return the axes of each leaf. ``dimension_numbers``: None for the last two axes (in, out); one for all; a tree
    that is a prefix of the parameters; or a function that makes one of them."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    numbers = resolved(params, dimension_numbers)
    return [matrix_axes(path_name(path), jnp.shape(p), each) for (path, p), each in zip(paths, numbers, strict=True)]


def resolved(params: Any, dimension_numbers: Any) -> list[Any]:
    """Return the dimension numbers of each leaf of ``params``, or None if a tree has None."""
    leaves = jax.tree.leaves(params)
    given = DimensionNumbers() if dimension_numbers is None else dimension_numbers
    if callable(given) and not is_dimension_numbers(given):
        given = given(params)
    if given is None or is_dimension_numbers(given):
        return [given] * len(leaves)
    if not leaves:
        return []
    found: list[Any] = []
    try:
        jax.tree.map(
            lambda each, part: found.extend([each] * len(jax.tree.leaves(part))),
            given,
            params,
            is_leaf=lambda x: x is None or is_dimension_numbers(x) or isinstance(x, optax.MaskedNode),
        )
    except ValueError as error:
        raise ValueError(f"dimension_numbers must be a tree like the parameters, or a prefix of it: {error}") from None
    return found


def path_name(path: Any) -> str:
    """Return the name of a parameter, from which its Q is drawn: the keys on the way to it, joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_seed(seed: int, name: str) -> int:
    """Return the parameter's own seed: that of the torch library, `orthoshard.engine.storage.parameter_seed`."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _key(seed: int) -> Array:
    """Return a key of a fixed, counter-based kind, so that values depend on no setting and on no sharding."""
    halves = jax.random.key(seed & 0x7FFFFFFF, impl="threefry2x32")
    return jax.random.fold_in(halves, seed >> 31 & 0xFFFFFFFF)


def _normal(key: Array, shape: tuple[int, ...], scale: float, dtype: Any, sharding: Any) -> Array:
    drawn = jax.random.normal(key, shape, jnp.float32, out_sharding=sharding)
    return (drawn * scale).astype(dtype)


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    return jnp.zeros(shape, dtype, out_sharding=sharding)
