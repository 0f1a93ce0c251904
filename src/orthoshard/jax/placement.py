"""What the compiler is told of small and thin matrices. Everything else it finds by itself.

Q may be sharded along r, as its parameter is along the axis that r replaces. Left alone, the compiler carries
that sharding into products and Gram matrices, and sends more than the size of the factors (docs/frameworks.md,
JAX). So every thin factor is whole along r while it is used; along all other axes the compiler is free. May
import jax, optax and `axes`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .axes import Thin

FREE = PartitionSpec.UNCONSTRAINED


@dataclass(frozen=True)
class Placement:
    """``mesh``: the mesh over which parameters are sharded; None: that of `jax.set_mesh`, or none. ``by_owners``:
    whether stacks of matrices are sharded along the stack in the state, but not in the weights."""

    mesh: Mesh | None = None
    by_owners: bool = False

    def whole_rank(self, x: Array, thin: Thin) -> Array:
        return self.whole(x, [thin.rank_axis])

    def published(self, x: Array, batch_axes: Sequence[int]) -> Array:
        """Gather a thin factor of all matrices from the owners of their state."""
        return self.whole(x, batch_axes) if self.by_owners and batch_axes else x

    def whole(self, x: Array, axes: Sequence[int]) -> Array:
        """Return x, not sharded along these axes."""
        spec = PartitionSpec(*(None if axis in axes else FREE for axis in range(x.ndim)))
        ambient = jax.sharding.get_abstract_mesh()
        if not ambient.empty:
            return lax.with_sharding_constraint(x, spec) if AxisType.Auto in ambient.axis_types else x
        return x if self.mesh is None else lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def state_sharding(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a state of this shape beside a parameter. It is that of the parameter, except along axes
    whose pieces would differ in length; for these, which concern Q, it warns."""
    entries: list[Any] = []
    for length, entry in zip(shape, (*sharding.spec, *(None,) * len(shape)), strict=False):
        names = () if entry is None or entry is FREE else entry if isinstance(entry, tuple) else (entry,)
        pieces = math.prod(sharding.mesh.shape[name] for name in names)
        even = length % pieces == 0
        if not even and length > 1:
            warnings.warn(
                f"axes {', '.join(names)} cut a parameter in {pieces}, but not the rank {length} of its Q, which is "
                f"whole on every device along it; rank_multiple_of={pieces} makes a rank that they cut evenly",
                stacklevel=2,
            )
        entries.append(entry if names and even else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Any,
    *,
    owners: str | None = None,
    replicas: str | None = None,
) -> Any:
    """Return the shardings of ``optimizer.init(params)``, for `jax.jit`'s out_shardings and for restoring a checkpoint.

    Each state lies as its parameter does, whatever optimizer it belongs to. Q is not sharded by a mesh axis that does
    not divide its rank. State that belongs to no parameter is replicated.

    Args:
        params: arrays, or a `jax.ShapeDtypeStruct` for each, with a NamedSharding.
        owners: a mesh axis along which parameters are replicated. The state of a stack of matrices (three axes or more)
            is sharded by it along its first axis, if that is not sharded and its length allows it: for
            ``shard_state="zero1"``.
        replicas: the mesh axis of replicas with gradients of their own, along which their momenta lie.
    """
    meshes = [p.sharding.mesh for p in jax.tree.leaves(params)]
    if not meshes:
        raise ValueError("there are no parameters whose shardings could be followed")
    state = jax.eval_shape(optimizer.init, params)

    def one(held: Any, parameter: Any) -> Any:
        if isinstance(held, optax.MaskedNode):
            return held
        behind = len(held.shape) - len(parameter.shape)  # 1: an axis of replicas in front
        sharding = state_sharding(parameter.sharding, held.shape[behind:])
        mesh, spec = sharding.mesh, sharding.spec
        if behind:
            return NamedSharding(mesh, PartitionSpec(replicas, *spec))
        if owners and len(held.shape) > 2 and spec[0] is None and held.shape[0] % mesh.shape[owners] == 0:
            return NamedSharding(mesh, PartitionSpec(owners, *spec[1:]))
        return sharding

    return optax.tree.map_params(
        optimizer,
        one,
        state,
        params,
        transform_non_params=lambda _: NamedSharding(meshes[0], PartitionSpec()),
        is_leaf=lambda held: isinstance(held, optax.MaskedNode),
    )


def made_like(parameter: Any, shape: tuple[int, ...], make: Callable[[Any], Array]) -> Array:
    """Make a state of this shape beside a parameter. ``make`` gets its sharding, if one is known, and each device makes
    its own piece. Under `jax.jit` without explicit axes no sharding is visible: give `jit` out_shardings."""
    here = isinstance(parameter, jax.Array) and not isinstance(parameter, Tracer)
    made = jax.jit(make, static_argnums=0) if here else make  # one program, so the same bits everywhere
    explicit = explicit_sharding(parameter)
    if explicit is not None:
        return made(state_sharding(explicit, shape))
    if here and isinstance(parameter.sharding, NamedSharding):
        return jax.jit(make, static_argnums=0, out_shardings=state_sharding(parameter.sharding, shape))(None)
    return made(None)


def in_auto_axes(f: Callable[..., Any], results_like: Any) -> Callable[..., Any]:
    """Return f itself, or, if types say how arrays are sharded, f with shardings that the compiler finds inside, as
    it does elsewhere, and results sharded as ``results_like``."""
    shardings = [explicit_sharding(x) for x in jax.tree.leaves(results_like)]
    if not any(sharding is not None for sharding in shardings):
        return f
    wanted = jax.tree.unflatten(jax.tree.structure(results_like), shardings)
    return jax.sharding.auto_axes(f, out_sharding=wanted)


def explicit_sharding(x: Any) -> Any:
    """Return the sharding in x's type, if its mesh has explicit axes; otherwise None."""
    sharding = getattr(x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return sharding
