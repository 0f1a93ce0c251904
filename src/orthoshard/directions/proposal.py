"""What a direction returns: U = L Rᵀ + diag(d) X, as data. Nothing is formed and nothing is written.

The driver writes W = decay W - size diag(f) U; f is what normalization makes of the rows. May import torch, `linalg`,
`request` and `seen`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..linalg.products import multiply, thin_matmul
from ..linalg.unit import row_squares
from .request import Asks, Sum
from .seen import Seen


@dataclass
class Proposal:
    """U = L Rᵀ + diag(d) X of b matrices, this rank's pieces: thin factors, a row-scaled full matrix, or both.

    The first four fields are U. The others are for error feedback, the next Q, and what is known without forming U.

    left, right   L (b, m, r) and R (b, n, r)
    rows          d (b, m, 1); None for 1
    full          X (b, m, n): a full matrix, or what the direction has seen, which every rank holds already
    orthonormal   which of the factors has orthonormal columns, or zero ones
    basis         the next Q: the factor that is not orthonormal, or what that factor was made of
    live          (b, 1, r): above 0 if the column of basis is above noise. Other columns of Q stay as they were
    captured      (b, 1, r): L diag(captured) Rᵀ is the part of X that rank r captured, which error feedback takes out
                  of the momentum
    withheld      (b, m, n): that part, if it was formed
    selected      (b, m, 1) or (b, 1, n), 1 or 0: the rows or columns of N that were applied, which error feedback
                  takes out
    beyond        |E_i|² (b, m, 1), if U = basis Rᵀ + diag(d) E, R is orthonormal and E R = 0: |U_i|² is then known
                  without forming U
    squares       |U_i|² (b, m, 1), finished over the columns, once computed
    factor        f (b, m, 1), of normalization; None for 1
    """

    left: Tensor | None = None
    right: Tensor | None = None
    rows: Tensor | None = None
    full: Tensor | Seen | None = None
    orthonormal: Literal["left", "right"] | None = None
    basis: Tensor | None = None
    live: Tensor | None = None
    captured: Tensor | None = None
    withheld: Tensor | None = None
    selected: Tensor | None = None
    beyond: Tensor | None = None
    squares: Tensor | None = None
    factor: Tensor | None = None

    def row_squares(self) -> Asks:
        """Return the squared row lengths of diag(f) U, (b, m, 1), finished over the columns. O(m r²) if U is thin."""
        squares: Tensor = (yield from self._squares()) if self.squares is None else self.squares
        self.squares = squares
        return squares if self.factor is None else squares * self.factor.square()

    def square(self) -> Asks:
        """Return the squared Frobenius norm of diag(f) U, (b, 1, 1), finished."""
        squares = yield from self.row_squares()
        return (yield Sum(squares.sum(1, keepdim=True), over="rows"))

    def scale_rows(self, factor: Tensor) -> None:
        """Multiply the rows of U by (b, m, 1), or each matrix by (b, 1, 1)."""
        self.factor = factor if self.factor is None else self.factor * factor

    def formed(self) -> Tensor:
        """Return this rank's piece of diag(f) U, (b, m, n), for code that needs its entries."""
        formed = self.full.formed() if isinstance(self.full, Seen) else self.full
        if formed is not None and self.rows is not None:
            formed = formed * self.rows
        if self.left is not None and self.right is not None:
            thin = _product(self.left, self.right)
            formed = thin if formed is None else formed + thin
        assert formed is not None, "an update of nothing"
        return formed if self.factor is None else formed * self.factor

    def replace(self, U: Tensor) -> None:
        """Replace what was proposed by ``U`` (b, m, n). Q and error feedback stay those of the direction."""
        if self.captured is not None and self.left is not None and self.right is not None:
            self.withheld = _product(self.left * self.captured, self.right)
        self.full = U
        self.left = self.right = self.rows = self.factor = None
        self.orthonormal = self.captured = self.beyond = self.squares = None

    def _squares(self) -> Asks:
        if self.orthonormal == "right" and self.basis is not None and (self.full is None or self.beyond is not None):
            squares = row_squares(self.basis)  # |V_i Pᵀ|² = |V_i|²
            if self.beyond is None:
                return squares
            return squares + (self.beyond if self.rows is None else self.rows.square() * self.beyond)
        X = self.full.formed() if isinstance(self.full, Seen) else self.full
        found: Tensor | None = None
        if X is not None:
            lengths: Tensor = yield Sum(row_squares(X), over="columns")
            found = lengths if self.rows is None else lengths * self.rows.square()
        if self.left is None or self.right is None:
            assert found is not None, "an update of nothing"
            return found
        gram = yield Sum(thin_matmul(self.right.mT, self.right), over="columns")
        thin_part = (thin_matmul(self.left, gram) * self.left).sum(-1, keepdim=True)
        if X is None or found is None:
            return thin_part
        mixed = yield Sum(thin_matmul(X, self.right), over="columns")
        cross = 2 * (self.left * mixed).sum(-1, keepdim=True) * (1 if self.rows is None else self.rows)
        return (thin_part + cross + found).clamp(min=0)


# The side of the matrix that each dimension of a field follows, for code that sends a proposal to other ranks. "basis"
# is the side of Q; "rank", "one" and "any" are no side.
FOLLOWS: dict[str, tuple[str, str]] = {
    "left": ("rows", "rank"),
    "right": ("columns", "rank"),
    "rows": ("rows", "one"),
    "full": ("rows", "columns"),
    "basis": ("basis", "rank"),
    "live": ("one", "rank"),
    "captured": ("one", "rank"),
    "withheld": ("rows", "columns"),
    "selected": ("any", "any"),
    "beyond": ("rows", "one"),
    "squares": ("rows", "one"),
    "factor": ("rows", "one"),
}


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return L Rᵀ in the wider of their dtypes, which differ if state is narrower than what is computed from it."""
    wide = torch.promote_types(left.dtype, right.dtype)
    return multiply(left.to(wide), right.to(wide).mT)
