"""Which axes of a parameter make its matrices, and products of such matrices in place.

W is a parameter of any rank. Its *output* axes together are the rows of its matrices (m = d_out), its *reduction* axes
their columns (n = d_in), and every other axis counts matrices:

    shape                   reduction   output      matrices
    (in, out)               0           1           one of out x in
    (experts, in, out)      1           2           one for each expert
    (embed, heads, head)    0           (1, 2)      one of (heads · head) x embed
    (heads, head, embed)    (0, 1)      2           one of embed x (heads · head)

A *thin factor* keeps the parameter's axes: instead of the side that it does not span it has r on the first axis and 1
on the others. So for a kernel (in, out) a row factor (m, r) is (r, out), and a column factor (n, r) is (in, r). Code
that places a state like its parameter also places a factor correctly. Nothing is reshaped or transposed: a product is
one `dot_general` over the axes where they are, so an axis that a mesh shards stays that axis. May import jax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

Precision = Any  # any precision that jnp.einsum takes


class DimensionNumbers(NamedTuple):
    """Which axes of a parameter are the columns (``reduction_axis``, d_in) and rows (``output_axis``, d_out) of its
    matrices; all others count matrices. Each is one axis or several; negative numbers count from the end.
    `optax.contrib`'s MuonDimensionNumbers work as well."""

    reduction_axis: int | Sequence[int] = -2
    output_axis: int | Sequence[int] = -1


def is_dimension_numbers(x: Any) -> bool:
    """Return whether x is a `DimensionNumbers`, ours or optax's."""
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


@dataclass(frozen=True)
class Thin:
    """The axes of a thin factor (k, r), one letter for each: r for the rank, capitals for axes of length 1."""

    letters: str
    batch: str
    side: str  # the letters of its k rows

    @property
    def rank_axis(self) -> int:
        return self.letters.index("r")

    @property
    def side_axes(self) -> tuple[int, ...]:
        return tuple(self.letters.index(x) for x in self.side)

    def gram(self, Y: Array) -> Array:
        """Return YᵀY (batch..., r, r), in full precision."""
        return self.projections(Y, Y)

    def projections(self, Y: Array, Z: Array) -> Array:
        """Return YᵀZ (batch..., r, r), in full precision."""
        other = self.letters.replace("r", "s")
        return jnp.einsum(f"{self.letters},{other}->{self.batch}rs", Y, Z, precision=lax.Precision.HIGHEST)

    def times(self, Y: Array, X: Array) -> Array:
        """Return Y X for X (batch..., r, r), in full precision."""
        after = self.letters.replace("r", "s")
        return jnp.einsum(f"{self.letters},{self.batch}rs->{after}", Y, X, precision=lax.Precision.HIGHEST)

    def columns(self, x: Array) -> Array:
        """Return x (batch..., r), one number per column, with axes that broadcast against the factor."""
        kept = self.batch + "r"
        inserted = [axis for axis, letter in enumerate(self.letters) if letter not in kept]
        order = sorted(range(len(kept)), key=lambda k: self.letters.index(kept[k]))
        return lax.expand_dims(lax.transpose(x, order), inserted)


@dataclass(frozen=True)
class MatrixAxes:
    """The axes of one parameter, as letters: W (m, n) for each element of its batch axes."""

    shape: tuple[int, ...]
    batch: str
    rows: str
    columns: str

    @cached_property
    def weight(self) -> str:
        return _LETTERS[: len(self.shape)]

    @property
    def m(self) -> int:
        return self._length(self.rows)

    @property
    def n(self) -> int:
        return self._length(self.columns)

    @property
    def d(self) -> int:
        return min(self.m, self.n)

    @property
    def transposed(self) -> "MatrixAxes":
        """The axes of Wᵀ, which is the same array."""
        return replace(self, rows=self.columns, columns=self.rows)

    @cached_property
    def row_factor(self) -> Thin:
        """(m, r)"""
        return Thin(self._thin(self.columns), self.batch, self.rows)

    @cached_property
    def column_factor(self) -> Thin:
        """(n, r)"""
        return Thin(self._thin(self.rows), self.batch, self.columns)

    def row_factor_shape(self, r: int) -> tuple[int, ...]:
        return tuple(
            r if x == "r" else 1 if x.isupper() else k for x, k in zip(self.row_factor.letters, self.shape, strict=True)
        )

    def times(self, N: Array, P: Array, precision: Precision) -> Array:
        """Return N P (m, r) for P (n, r)."""
        return self._product(N, P, self.column_factor, self.row_factor, precision)

    def transposed_times(self, N: Array, Q: Array, precision: Precision) -> Array:
        """Return Nᵀ Q (n, r) for Q (m, r)."""
        return self._product(N, Q, self.row_factor, self.column_factor, precision)

    def outer(self, L: Array, P: Array, precision: Precision) -> Array:
        """Return L Pᵀ (m, n) for L (m, r), P (n, r)."""
        left, right = self.row_factor.letters, self.column_factor.letters
        return jnp.einsum(f"{left},{right}->{self.weight}", L, P, precision=precision)

    def over_columns(self, x: Array) -> Array:
        """Sum over the columns of a matrix or a row factor: one number per row, (m, 1) with the axes of W."""
        return x.sum(self.axes(self.columns), keepdims=True)

    def over_rows(self, x: Array) -> Array:
        """Sum over rows: one number per column, (1, n) with the axes of W, or (1, r) for a row factor."""
        return x.sum(self.axes(self.rows), keepdims=True)

    def over_matrix(self, x: Array) -> Array:
        """Sum over each matrix: one number, (1, 1) with the axes of W."""
        return x.sum(self.axes(self.rows + self.columns), keepdims=True)

    def largest(self, x: Array) -> Array:
        """Return max |x_ij| of each matrix, (1, 1) with the axes of W."""
        return jnp.abs(x).max(self.axes(self.rows + self.columns), keepdims=True)

    def axes(self, letters: str) -> tuple[int, ...]:
        return tuple(self.weight.index(x) for x in letters)

    def _product(self, N: Array, factor: Array, given: Thin, result: Thin, precision: Precision) -> Array:
        kept = "".join(x for x in result.letters if not x.isupper())
        product = jnp.einsum(f"{self.weight},{given.letters}->{kept}", N, factor, precision=precision)
        return lax.expand_dims(product, [axis for axis, x in enumerate(result.letters) if x.isupper()])

    def _thin(self, given_up: str) -> str:
        first, *others = given_up
        return "".join("r" if x == first else x.upper() if x in others else x for x in self.weight)

    def _length(self, letters: str) -> int:
        return math.prod(self.shape[self.weight.index(x)] for x in letters)


_LETTERS = "abcdefgh"


def matrix_axes(name: str, shape: tuple[int, ...], numbers: Any) -> MatrixAxes:
    """Read a parameter by its dimension numbers.

    Raises TypeError if these are no `DimensionNumbers`, ValueError if they make no matrix of the parameter.
    """
    name = name or "the parameter"
    if not is_dimension_numbers(numbers):
        raise TypeError(f"{name}: {numbers!r} is no DimensionNumbers, such as DimensionNumbers(-2, -1)")
    if not 2 <= len(shape) <= len(_LETTERS):
        raise ValueError(
            f"{name} has shape {shape}, which holds no matrix; give it to another optimizer, by None in its place in "
            "dimension_numbers (of dion, muon, ...) or by optax.masked"
        )
    reduction, output = (_axes(name, shape, axis) for axis in (numbers.reduction_axis, numbers.output_axis))
    if set(reduction) & set(output) or not reduction or not output:
        raise ValueError(
            f"{name}: reduction_axis={numbers.reduction_axis} and output_axis={numbers.output_axis} of shape {shape} "
            "must each name at least one axis, and none in common"
        )
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape} and therefore no entries; leave it out")
    letters = _LETTERS[: len(shape)]
    batch = "".join(x for axis, x in enumerate(letters) if axis not in (*reduction, *output))
    return MatrixAxes(shape, batch, *("".join(letters[axis] for axis in axes) for axes in (output, reduction)))


def _axes(name: str, shape: tuple[int, ...], given: int | Sequence[int]) -> list[int]:
    axes = [given] if isinstance(given, int) else list(given)
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(f"{name} has shape {shape}; there is no axis {given} in it")
    axes = [axis % len(shape) for axis in axes]
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name}: {given} names an axis of shape {shape} twice")
    return axes
