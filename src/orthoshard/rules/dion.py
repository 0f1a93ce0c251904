"""Dion: distributed orthonormalized updates (Ahn, Xu, Abreu, Langford, arXiv 2504.05295, v3 Algorithm 1).

    M += G
    P  = orthonormal(X Q)               X = M, or Mᵀ where Q spans the rows of W
    R  = Xᵀ P
    X -= (1 - momentum) P Rᵀ            error feedback: what rank r did not capture stays
    Q  = R / (column norms of R)
    W  = (1 - lr wd) W - lr s P Qᵀ      s = sqrt(d_out / d_in) by default; P Qᵀ transposed as X is

W, M (b, m, n); X (b, p, q) is M or Mᵀ; Q (b, q, r); P (b, p, r); R (b, q, r); r = ceil(rank_fraction min(m, n)).

M is read through 1/a, a power of two near its largest entry: exact, so that no size of gradient over- or underflows.
Where all sizes are ordinary that changes no bit and is left out.
X enters P and R linearly, through X Q and Xᵀ P. So replicas may keep the momenta of their own gradients and exchange
the means of these two thin products instead of gradients ("compressed gradient sync"; PowerSGD, arXiv 1905.13727): the
error feedback then takes the same P Rᵀ from each momentum, and their mean is the momentum of the mean gradient.
May import torch, `linalg` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.accumulate import Product, accumulate_and_multiply, add_product, add_products, first_product
from ..linalg.products import thin
from ..linalg.scale import scale_where_needed
from ..linalg.unit import column_squares, normalize_columns
from .demand import Dealt, Demand, Shared, Summed
from .figures import factor_figures
from .low_rank import LowRankRule, noise_of
from .request import Each, Note, Part, Publish, Share, Shown, Sum, Update
from .rule import SCALES, Batch, Slot, one_of, state_dtype


@dataclass(frozen=True)
class DionRule(LowRankRule):
    """Hyperparameters of Dion; the defaults are the paper's where it gives one (v3, section 4 and appendix D)."""

    name: ClassVar[str] = "dion"
    heeds_skip: ClassVar[bool] = True
    matrices: ClassVar[bool] = True
    factors: ClassVar[bool] = True
    publishes: ClassVar[bool] = True

    error_feedback: bool = True
    q_side: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("q_side", self.q_side, ("rows", "columns"))

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        kept = state_dtype(self.state_dtype, dtype)
        return {
            "momentum": Slot(("rows", "columns"), kept, linear=True),
            "Q": Slot((self.q_side, self.rank(*shape)), kept, fill="normal"),
        }

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Demand:
        """Four products of 2 m n r flops, two of them by each replica for its share; an orthonormalization of P in two
        passes of 4 p r² + 2/3 r³ (Gram, Cholesky, inverse, product). Accesses: survey of G 1, M += G 3, X Q 1, Xᵀ P 1,
        error feedback 2, W 2."""
        m, n = shape
        r, kept = self.rank(m, n), state_dtype(self.state_dtype, dtype)
        p_side, p = ("columns", n) if self.q_side == "rows" else ("rows", m)
        norms = torch.promote_types(kept, torch.float32)
        feedback = int(self.error_feedback)
        return Demand(
            divisible=2.0 * m * n * r * (1 + feedback),
            shared=4.0 * m * n * r + 2 * (4.0 * p * r**2 + 2 / 3 * r**3),
            accesses=8 + 2 * feedback,
            asks=(
                Summed((1, 1), torch.float64, over="both", averaged=True),
                Shared(
                    inside=(
                        Dealt((p_side, r), kept, over=p_side, partial=self.q_side, averaged=True),
                        Summed((self.q_side, r), kept, over=p_side, averaged=True),
                        Summed((r,), norms, over=self.q_side),
                    ),
                    results=(((p_side, r), kept), ((self.q_side, r), kept), ((r,), norms)),
                ),
            ),
            published=(((p_side, r), kept), ((self.q_side, r), kept)),
            applied=2.0 * m * n * r,
            surveyed=3,
        )

    def update(self, batch: Batch) -> Update:
        M, Q = batch.state["momentum"], batch.state["Q"]
        transposed = self.q_side == "rows"
        X = M.mT if transposed else M
        noise = noise_of(M.dtype, batch.shape, self.matmul_precision)

        kept, precision = 1.0 if self.error_feedback else self.momentum, self.matmul_precision
        largest, Y = accumulate_and_multiply(M, batch.gradients, kept, Q, transposed, precision, batch.skip)
        # float64, because the sum over ranks of what float32 just holds is more than float32 holds
        a = scale_where_needed((yield Sum(largest.double(), over="both", averaged=True)), M.dtype)
        P, R, norms = yield Share(partial(self._factors, noise), (X, Q, a, Y))

        V = normalize_columns(R, norms, noise, Q, batch.skip)
        size = self.lr * SCALES[self.scale](*batch.shape)
        yield Note(M, self._figures, (P, V, norms, a, size))
        left, right = yield Publish((V, P) if transposed else (P, V))
        if self.error_feedback:
            captured = Product(P, R, self.momentum - 1, a, bears="left")
            taken, added = captured.transposed() if transposed else captured, Product(left, right, -size)
            add_products(M, taken, batch.weights, added, self.decay(), precision, batch.rounding, batch.skip)
        else:
            add_product(batch.weights, left, right, -size, self.decay(), precision, batch.rounding)

    def _figures(self, P: Tensor, V: Tensor, norms: Tensor, a: Tensor | None, size: float | Tensor) -> Shown:
        captured = (norms.double() if a is None else norms.double() * a).square().sum((-2, -1))
        p_side = "columns" if self.q_side == "rows" else "rows"
        return factor_figures(P, V, captured, size, p_side, self.q_side)

    def _factors(self, noise: float, X: Tensor, Q: Tensor, a: Tensor | None, Y: Tensor | None) -> Part:
        """P, R / a and the column norms of R / a: one amortized power iteration. Y: what accumulation made of X Q."""
        p_side = "columns" if self.q_side == "rows" else "rows"
        product = first_product(X, Q, a, Y, self.matmul_precision)
        P = yield Each(self.orthonormalize(noise), product, over=p_side, partial=self.q_side, averaged=True)
        R = yield Sum(thin(X.mT, P if a is None else P / a, self.matmul_precision), over=p_side, averaged=True)
        squares = yield Sum(column_squares(R), over=self.q_side)
        return P, R, squares.sqrt()
