"""The same run under JAX and under PyTorch: the torch library's initial Q, and its state and weights, both ways.

    from orthoshard.jax import torch_bridge
    state = torch_bridge.with_torch_basis(state, seed=0, names=...)     # Q as torch draws it for (seed, name)
    tensors = {name: optimizer.state[p] for name, p in model.named_parameters()}
    state = torch_bridge.from_torch(state, tensors, names=...)
    tensors = torch_bridge.to_torch(state, names=...)                   # {name: {"momentum": ..., "Q": ...}}

A parameter (in, out) is a torch weight (out, in) = (m, n): its output axes become the rows, its reduction axes the
columns, and axes that count matrices come first. ``names``: the torch name of a parameter from its path in the JAX
tree, as for `scale_by_dion`. ``state`` may be that of any chain of transformations that contains ours. May import
torch and `linalg.initial`, inside functions, jax and this room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .axes import MatrixAxes
from .transform import MatrixState, Names, axes_of, parameter_seed, path_name

if TYPE_CHECKING:
    from torch import Tensor

State = Any


def with_torch_basis(
    state: State,
    *,
    seed: int = 0,
    names: Names | None = None,
    dimension_numbers: Any = None,
    q_side: str = "rows",
) -> State:
    """Return ``state`` with the Q that the torch library starts from: standard normal in float32 from (seed, name),
    over sqrt(q) for q rows of Q."""
    from orthoshard.linalg.initial import normal_piece

    def drawn(name: str, axes: MatrixAxes, old: Array) -> Array:
        side = axes if q_side == "rows" else axes.transposed
        r = old.shape[side.row_factor.rank_axis]
        batch = [axes.shape[axis] for axis in axes.axes(axes.batch)]
        shape = (*batch, side.m, r)
        normal = normal_piece(shape, [(0, length) for length in shape], parameter_seed(seed, name))
        return _placed(_from_factor((normal / math.sqrt(side.m)).numpy(), side, r), old)

    def replaced(node: MatrixState, named: list[tuple[str, MatrixAxes]]) -> MatrixState:
        leaves, structure = jax.tree.flatten(node.Q)
        return node._replace(
            Q=structure.unflatten([drawn(name, ax, old) for (name, ax), old in zip(named, leaves, strict=True)])
        )

    return _each_state(state, replaced, names, dimension_numbers)


def to_torch(
    state: State, *, names: Names | None = None, dimension_numbers: Any = None, q_side: str = "rows"
) -> dict[str, dict[str, Tensor]]:
    """Return momentum, Q and row moment of every matrix, by torch name, as `torch` tensors in the shapes of
    the torch library's state."""
    import torch

    found: dict[str, dict[str, Tensor]] = {}

    def read(node: MatrixState, named: list[tuple[str, MatrixAxes]]) -> MatrixState:
        momenta, bases, moments = map(jax.tree.leaves, node)
        for number, (name, axes) in enumerate(named):
            side = axes if q_side == "rows" else axes.transposed
            held = {"momentum": _to_matrix(np.asarray(momenta[number]), axes)}
            if bases:
                held["Q"] = _to_factor(np.asarray(bases[number]), side)
            if moments:
                held["row_moment"] = _to_factor(np.asarray(moments[number]), axes)[..., 0]
            found[name] = {key: torch.tensor(value) for key, value in held.items()}
        return node

    _each_state(state, read, names, dimension_numbers)
    return found


def from_torch(
    state: State,
    tensors: Mapping[str, Mapping[str, Any]],
    *,
    names: Names | None = None,
    dimension_numbers: Any = None,
    q_side: str = "rows",
) -> State:
    """Return ``state`` with momentum, Q and row moment from the torch library, by torch name; each keeps its
    dtype and place in ``state``.

    Raises KeyError if ``tensors`` lacks the state of a matrix, ValueError if one has another shape.
    """
    for name, held in tensors.items():
        if any(key.endswith("_scales") for key in held):
            raise ValueError(
                f"the state of {name!r} is in 8 bits, which optax does not keep: call optimizer.convert_state(None) on "
                f"the torch side first"
            )

    def taken(node: MatrixState, named: list[tuple[str, MatrixAxes]]) -> MatrixState:
        leaves, structures = zip(*map(jax.tree.flatten, node), strict=True)
        momenta, bases, moments = leaves
        for number, (name, axes) in enumerate(named):
            side = axes if q_side == "rows" else axes.transposed
            momenta[number] = _placed(_from_matrix(_array(tensors[name]["momentum"]), axes), momenta[number])
            if bases:
                r = bases[number].shape[side.row_factor.rank_axis]
                bases[number] = _placed(_from_factor(_array(tensors[name]["Q"]), side, r), bases[number])
            if moments:
                column = _array(tensors[name]["row_moment"])[..., None]
                moments[number] = _placed(_from_factor(column, axes, 1), moments[number])
        return MatrixState(*(structure.unflatten(each) for structure, each in zip(structures, leaves, strict=True)))

    return _each_state(state, taken, names, dimension_numbers)


def weights_from_torch(
    params: Any, tensors: Mapping[str, Any], *, names: Names | None = None, dimension_numbers: Any = None
) -> Any:
    """Return ``params`` with the values of torch weights (batch..., m, n), by torch name; all must be matrices."""
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    axes = axes_of(params, dimension_numbers)
    return structure.unflatten(
        _placed(_from_matrix(_array(tensors[(names or path_name)(path)]), ax), p)
        for (path, p), ax in zip(paths, axes, strict=True)
    )


def weights_to_torch(params: Any, *, names: Names | None = None, dimension_numbers: Any = None) -> dict[str, Tensor]:
    """Return parameters as torch weights (batch..., m, n), by torch name; all must be matrices."""
    import torch

    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    axes = axes_of(params, dimension_numbers)
    return {
        (names or path_name)(path): torch.tensor(_to_matrix(np.asarray(p), ax))
        for (path, p), ax in zip(paths, axes, strict=True)
    }


def _each_state(
    state: State,
    f: Callable[[MatrixState, list[tuple[str, MatrixAxes]]], MatrixState],
    names: Names | None,
    dimension_numbers: Any,
) -> State:
    found = 0

    def one(node: Any) -> Any:
        nonlocal found
        if not isinstance(node, MatrixState):
            return node
        found += 1
        paths = jax.tree_util.tree_flatten_with_path(node.momentum)[0]
        axes = axes_of(node.momentum, dimension_numbers)
        return f(node, [((names or path_name)(path), ax) for (path, _), ax in zip(paths, axes, strict=True)])

    result = jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, MatrixState))
    if not found:
        raise ValueError("this state holds no MatrixState: it is none of scale_by_dion, dion, muon, ...")
    return result


def _order(axes: MatrixAxes, letters: str) -> list[int]:
    return [letters.index(x) for x in axes.batch + axes.rows + axes.columns]


def _to_matrix(x: np.ndarray, axes: MatrixAxes) -> np.ndarray:
    batch = [axes.shape[axis] for axis in axes.axes(axes.batch)]
    return x.transpose(_order(axes, axes.weight)).reshape(*batch, axes.m, axes.n)


def _from_matrix(x: np.ndarray, axes: MatrixAxes) -> np.ndarray:
    order = _order(axes, axes.weight)
    _fits(x, (*(axes.shape[axis] for axis in axes.axes(axes.batch)), axes.m, axes.n))
    return x.reshape([axes.shape[axis] for axis in order]).transpose(np.argsort(order))


def _to_factor(x: np.ndarray, axes: MatrixAxes) -> np.ndarray:
    batch = [axes.shape[axis] for axis in axes.axes(axes.batch)]
    return x.transpose(_order(axes, axes.weight)).reshape(*batch, axes.m, -1)


def _from_factor(x: np.ndarray, axes: MatrixAxes, r: int) -> np.ndarray:
    order = _order(axes, axes.weight)
    _fits(x, (*(axes.shape[axis] for axis in axes.axes(axes.batch)), axes.m, r))
    shape = axes.row_factor_shape(r)
    return x.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _fits(x: np.ndarray, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"a torch tensor of shape {x.shape} does not fit {shape} (matrices, rows, columns or rank)")


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu().double().numpy() if hasattr(x, "detach") else x)


def _placed(value: np.ndarray, like: Array) -> Array:
    return jax.device_put(jnp.asarray(value, like.dtype), like.sharding)
