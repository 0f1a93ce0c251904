"""A matrix as directions see it: divided by a power of two near its largest entry, so that no size over- or underflows.

    X = diag(rows) N diag(columns) / a,   a = 2^k near max |N_ij|

X is formed only if no thin factor can take the scales. Rows and columns are those of equilibration. a is exact, and
applied in two halves: XLA flushes denormal numbers to zero, and a thin factor divided by 2^123 at once would be one.
May import jax, `axes` and `placement`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import Array

from .axes import MatrixAxes, Precision
from .placement import Placement


@dataclass(frozen=True)
class Scaled:
    """X. N (m, n) for each element of the batch, in float32 or float64; ``rows`` (m, 1) and ``columns``
    (1, n) broadcast against it.

    ``replicated``: N has one more axis in front, of replicas with gradients of their own, and X stands for the mean
    over it. Products with thin factors are linear in N, so replicas exchange only the means of these.
    """

    N: Array
    axes: MatrixAxes
    placement: Placement
    precision: Precision
    replicated: bool = False
    rows: Array | float = 1.0
    columns: Array | float = 1.0

    @cached_property
    def a(self) -> tuple[Array, Array]:
        """Two powers of two whose product is a, (1, 1) with the axes of N."""
        largest = jax.vmap(self.axes.largest)(self.N).max(0) if self.replicated else self.axes.largest(self.N)
        usable = (largest > 0) & jnp.isfinite(largest)
        exponent = jnp.frexp(jnp.where(usable, largest, 1))[1]
        half = exponent // 2
        one = jnp.ones_like(largest)
        return jnp.ldexp(one, half), jnp.ldexp(one, exponent - half)

    @property
    def entries(self) -> Array:
        """X itself, formed."""
        first, second = self.a
        return self.rows * (self.N / first / second) * self.columns

    def times(self, P: Array) -> Array:
        """Return X P (m, r)."""
        first, second = self.a
        product = self.rows * (self._mean(self.axes.times, self.columns * P / first) / second)
        return self.placement.whole_rank(product, self.axes.row_factor)

    def transposed_times(self, Q: Array) -> Array:
        """Return Xᵀ Q (n, r)."""
        first, second = self.a
        product = self.columns * (self._mean(self.axes.transposed_times, self.rows * Q / first) / second)
        return self.placement.whole_rank(product, self.axes.column_factor)

    def outer(self, L: Array, P: Array) -> Array:
        """Return L Pᵀ (m, n)."""
        return self.axes.outer(L, P, self.precision)

    def captured(self, L: Array, P: Array) -> Array:
        """Return the part of N that is L Pᵀ in X (m, n)."""
        first, second = self.a
        return self.outer(_over(L, self.rows) * first, _over(P, self.columns) * second)

    def published(self, L: Array, P: Array) -> Array:
        """Return L Pᵀ for the weights. If owners keep the state, only the thin factors leave them."""
        axes = self.axes.axes(self.axes.batch)
        return self.outer(self.placement.published(L, axes), self.placement.published(P, axes))

    @property
    def transposed(self) -> "Scaled":
        return replace(self, axes=self.axes.transposed, rows=self.columns, columns=self.rows)

    def _mean(self, product: Callable[[Array, Array, Precision], Array], factor: Array) -> Array:
        if not self.replicated:
            return product(self.N, factor, self.precision)
        return jax.vmap(lambda N: product(N, factor, self.precision))(self.N).mean(0)


def _over(x: Array, scale: Array | float) -> Array:
    """Return x / scale, and 0 if scale is 0."""
    return x / jnp.where(scale == 0, jnp.inf, scale)
