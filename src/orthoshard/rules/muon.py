"""Muon: momentum orthogonalized by Newton-Schulz (K. Jordan, 2024).

    M = momentum M + G
    N = G + momentum M   (Nesterov)   or   M
    O = polar(N)                          U Vᵀ of N = U S Vᵀ, by a few odd polynomials
    W = (1 - lr wd) W - lr s O            s by one of three conventions, see `rule.SCALES`

W, M, N, O (b, m, n). May import torch, `linalg` and `request`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.accumulate import accumulate, add_scaled, blocks
from ..linalg.polar import POLAR, polar
from .demand import Dealt, Demand, Shared
from .figures import polar_figures
from .request import Each, Note, Part, Publish, Share, Update
from .rule import SCALES, STATE_DTYPES, Batch, Rule, Slot, fraction, one_of, state_dtype


@dataclass(frozen=True)
class MuonRule(Rule):
    """Hyperparameters of Muon. ``polar_dtype`` None iterates in bfloat16 on CUDA and in the state's dtype elsewhere."""

    name: ClassVar[str] = "muon"
    matrices: ClassVar[bool] = True
    publishes: ClassVar[bool] = True

    lr: float | Tensor = 0.02
    weight_decay: float | Tensor = 0.01
    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "original"
    polar: str = "jordan"
    polar_dtype: str | None = None
    state_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("momentum", self.momentum, zero=True, one=False)
        one_of("scale", self.scale, list(SCALES))
        one_of("polar", self.polar, list(POLAR))
        one_of("polar_dtype", self.polar_dtype, (None, *STATE_DTYPES))
        one_of("state_dtype", self.state_dtype, (None, *STATE_DTYPES))

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        return {"momentum": Slot(("rows", "columns"), state_dtype(self.state_dtype, dtype))}

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype) -> Demand:
        """Newton-Schulz on d = min(m, n), D = max(m, n): 4 D d² + 2 d³ flops a step. Accesses: survey of G 1,
        M = mu M + G 3, Nesterov 3, scaling 2, each iteration 4, W 3."""
        d, D = min(shape), max(shape)
        steps = len(POLAR[self.polar].steps)
        kept = state_dtype(self.state_dtype, dtype)
        whole = ("rows", "columns")
        return Demand(
            shared=steps * (4.0 * D * d**2 + 2.0 * d**3),
            accesses=9 + 3 * self.nesterov + 4 * steps,
            asks=(Shared(inside=(Dealt(whole, kept, over="both"),), results=((whole, kept),)),),
            published=((whole, kept),),
            surveyed=4,
        )

    def update(self, batch: Batch) -> Update:
        M = batch.state["momentum"]
        accumulate(M, batch.gradients, self.momentum)
        N = self._nesterov(M, batch.gradients) if self.nesterov else M
        (orthogonal,) = yield Share(self._polar, (N,))
        size = self.lr * SCALES[self.scale](*batch.shape)
        yield Note(N, polar_figures, (orthogonal, size))
        (published,) = yield Publish((orthogonal,))
        add_scaled(batch.weights, published, -size, self.decay())

    def _polar(self, N: Tensor) -> Part:
        f = partial(polar, coefficients=POLAR[self.polar], dtype=self._polar_dtype(N))
        return ((yield Each(f, N, over="both")),)

    def _nesterov(self, M: Tensor, gradients: list[Tensor]) -> Tensor:
        N = torch.empty_like(M)
        for n, m, g in zip(blocks(N, gradients), blocks(M, gradients), gradients, strict=True):
            torch.add(g, m, alpha=self.momentum, out=n)
        return N

    def _polar_dtype(self, N: Tensor) -> torch.dtype:
        if self.polar_dtype is not None:
            return STATE_DTYPES[self.polar_dtype]
        return torch.bfloat16 if N.is_cuda else N.dtype
