"""Muon: momentum orthogonalized by Newton-Schulz (K. Jordan, 2024).

    M = momentum M + G
    N = G + momentum M   (Nesterov)   or   M
    O = polar(N)                          U Vᵀ of N = U S Vᵀ, by a few odd polynomials, see `linalg.polar`
    W = (1 - lr wd) W - lr s O            s by one of three conventions, see `rule.SCALES`

W, M, N, O (b, m, n). May import torch, `linalg` and `request`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.accumulate import accumulate, add_scaled, blocks
from ..linalg.polar import POLAR, Iteration, iteration, polar
from ..linalg.polar_kernels import check_kernels, kernel_flops, polar_by_kernels
from ..linalg.small import at_once
from .demand import Dealt, Demand, Shared
from .figures import polar_figures
from .request import Each, Note, Part, Publish, Share, Update
from .rule import SCALES, STATE_DTYPES, Batch, Rule, Slot, fraction, one_of, state_dtype

METHODS = ("auto", "newton_schulz", "gram", "gram_kernels")
POLAR_DTYPES = {**STATE_DTYPES, "float16": torch.float16}


@dataclass(frozen=True)
class MuonRule(Rule):
    """Hyperparameters of Muon. ``polar_dtype`` None iterates in the state's dtype on a CPU; elsewhere in 16 bits,
    bfloat16 under Newton-Schulz and float16, which has three bits more, on Gram matrices, whose products need them."""

    name: ClassVar[str] = "muon"
    heeds_skip: ClassVar[bool] = True
    matrices: ClassVar[bool] = True
    publishes: ClassVar[bool] = True

    lr: float | Tensor = 0.02
    weight_decay: float | Tensor = 0.01
    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "original"
    polar: str = "jordan"
    polar_method: Literal["auto", "newton_schulz", "gram", "gram_kernels"] = "auto"
    polar_dtype: str | None = None
    state_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("momentum", self.momentum, zero=True, one=False)
        one_of("scale", self.scale, list(SCALES))
        one_of("polar", self.polar, list(POLAR))
        one_of("polar_method", self.polar_method, METHODS)
        one_of("polar_dtype", self.polar_dtype, (None, *POLAR_DTYPES))
        if self.polar_method == "gram_kernels":
            check_kernels(self.polar_dtype)
        one_of("state_dtype", self.state_dtype, (None, *STATE_DTYPES))

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        return {"momentum": Slot(("rows", "columns"), state_dtype(self.state_dtype, dtype))}

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Demand:
        """The polar factor's flops, by its method. Accesses: survey of G 1, M = mu M + G 3, Nesterov 3, scaling 2, each
        round of the iteration 4, W 3."""
        kept = state_dtype(self.state_dtype, dtype)
        m, n = shape
        chosen = self._iteration((m, n), device, kept)
        kernels = self.polar_method == "gram_kernels"
        whole = ("rows", "columns")
        return Demand(
            shared=kernel_flops(chosen.rounds, (m, n)) if kernels else chosen.flops((m, n), device),
            accesses=9 + 3 * self.nesterov + 4 * len(chosen.rounds),
            asks=(Shared(inside=(Dealt(whole, kept, over="both"),), results=((whole, kept),)),),
            published=((whole, kept),),
            surveyed=4,
        )

    def update(self, batch: Batch) -> Update:
        M = batch.state["momentum"]
        accumulate(M, batch.gradients, self.momentum, batch.skip)
        N = self._nesterov(M, batch.gradients) if self.nesterov else M
        m, n = batch.shape
        (orthogonal,) = yield Share(partial(self._polar, shape=(m, n)), (N,))
        size = self.lr * SCALES[self.scale](*batch.shape)
        yield Note(N, polar_figures, (orthogonal, size))
        (published,) = yield Publish((orthogonal,))
        add_scaled(batch.weights, published, -size, self.decay(), batch.rounding, batch.skip)

    def _polar(self, N: Tensor, shape: tuple[int, int]) -> Part:
        table, chosen = POLAR[self.polar], self._iteration(shape, N.device.type, N.dtype)
        if self.polar_method == "gram_kernels":
            f = partial(polar_by_kernels, coefficients=table, rounds=chosen.rounds)
        else:
            f = partial(polar, coefficients=table, dtype=chosen.dtype, rounds=chosen.rounds)
        return ((yield Each(at_once(f), N, over="both")),)

    def _nesterov(self, M: Tensor, gradients: list[Tensor]) -> Tensor:
        N = torch.empty_like(M)
        for n, m, g in zip(blocks(N, gradients), blocks(M, gradients), gradients, strict=True):
            torch.add(g, m, alpha=self.momentum, out=n)
        return N

    def _iteration(self, shape: tuple[int, int], device: str, held: torch.dtype) -> Iteration:
        """How (m, n) matrices are iterated on."""
        table, method = POLAR[self.polar], self.polar_method
        named = None if self.polar_dtype is None else POLAR_DTYPES[self.polar_dtype]
        if method == "gram_kernels":  # in float16; a square matrix by single steps
            method, named = "newton_schulz" if shape[0] == shape[1] else "gram", torch.float16
        return iteration(method, table, shape, device, held, named)
