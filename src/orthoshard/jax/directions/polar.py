"""The polar factor U Vᵀ of N = U diag(s) Vᵀ by odd polynomials (Muon, K. Jordan 2024), for optax.

    X = N / |N|_F;   for each (a, b, c):   X <- a X + (b A + c A²) X,   A = X Xᵀ on the smaller side

which sends each singular value s to a s + b s³ + c s⁵. With p(A) = a I + b A + c A² the next A is p(A) A p(A), so
several steps may run on (d, d) matrices alone ("Gram Newton-Schulz"). That takes fewer flops from D > 1.5 d on, and a
sharded matrix then sends its Gram once per round. The tables are those of the torch library; for letters and reasons
see `orthoshard.linalg.polar`.

N, X (m, n); A (d, d), d = min(m, n), D = max(m, n). May import jax, this room and `orthoshard.linalg.polar_express`,
which needs no torch.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from ...linalg.polar_express import POLAR, Triple
from ..axes import MatrixAxes, Precision
from ..scaled import Scaled
from .proposal import Direction, Proposal

ROUNDS = {"float64": (3, 2), "float32": (3, 2), "float16": (3, 2), "bfloat16": (2, 2, 1)}
GRAM_FROM = 1.5  # above this D / d, rounds on Gram matrices take fewer flops than single steps


@dataclass(frozen=True)
class Polar:
    """The direction: its table, and the dtype of the iteration; None: the state's, but at least float32."""

    polar: str = "jordan"
    polar_dtype: str | None = None

    def propose(self, N: Scaled, Q: None) -> Direction:
        entries = N.entries
        norm = jnp.sqrt(N.axes.over_matrix(jnp.square(entries)))
        x = (entries / jnp.where(norm > 0, norm, 1)).astype(self.polar_dtype or entries.dtype)
        wide = N if N.axes.m <= N.axes.n else N.transposed
        square = _Square(wide.axes, wide.precision)
        steps = POLAR[self.polar].steps
        gram = max(N.axes.m, N.axes.n) > GRAM_FROM * N.axes.d
        x = N.placement.whole(x, wide.axes.axes(wide.axes.rows))  # otherwise it would be gathered in each round
        for k in ROUNDS[x.dtype.name] if gram else (1,) * len(steps):
            A = N.placement.whole(square.gram(x), square.side_axes)
            x = square.applied(_polynomials(square, A, steps[:k]), x)
            steps = steps[k:]
        return Proposal(x.astype(N.N.dtype))
        yield


def _polynomials(square: "_Square", gram: Array, steps: tuple[Triple, ...]) -> Array:
    """Return the product of p(A) for these steps, each time with the A of the X so far."""
    eye = square.eye(gram.dtype)
    product, now = eye, gram
    for number, (a, b, c) in enumerate(steps):
        p = a * eye + b * now + c * square.dot(now, now)
        product = square.dot(product, p) if number else p
        now = square.dot(square.dot(p, now), p) if number < len(steps) - 1 else now
    return product


@dataclass(frozen=True)
class _Square:
    """Products of matrices (d, d) over the rows of W, which may be several axes: batch, these axes, and these again."""

    axes: MatrixAxes
    precision: Precision

    def _letters(self) -> tuple[str, str, str, str]:
        rows = self.axes.rows
        return self.axes.batch, rows, _other(rows, 8), _other(rows, 16)

    @property
    def side_axes(self) -> tuple[int, ...]:
        b, i, _, _ = self._letters()
        return tuple(range(len(b), len(b) + 2 * len(i)))

    def gram(self, X: Array) -> Array:
        b, i, j, _ = self._letters()
        again = self._weight_over(j)
        return jnp.einsum(f"{self.axes.weight},{again}->{b}{i}{j}", X, X, precision=self.precision)

    def dot(self, A: Array, B: Array) -> Array:
        b, i, j, k = self._letters()
        return jnp.einsum(f"{b}{i}{j},{b}{j}{k}->{b}{i}{k}", A, B, precision=self.precision)

    def applied(self, A: Array, X: Array) -> Array:
        b, i, j, _ = self._letters()
        return jnp.einsum(f"{b}{i}{j},{self._weight_over(j)}->{self.axes.weight}", A, X, precision=self.precision)

    def eye(self, dtype: jnp.dtype) -> Array:
        lengths = tuple(self.axes.shape[axis] for axis in self.axes.axes(self.axes.rows))
        return jnp.eye(self.axes.m, dtype=dtype).reshape(lengths * 2)

    def _weight_over(self, rows: str) -> str:
        return self.axes.weight.translate(str.maketrans(self.axes.rows, rows))


def _other(letters: str, by: int) -> str:
    return "".join(chr(ord(x) + by) for x in letters)
