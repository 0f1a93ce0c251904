"""LoRAMuon's direction: Muon's step on the product of two factors (Cesista et al., arXiv 2606.12921, Algorithm 1).

    W = B A                                   B (m, r), A (r, n): lora_B and lora_A as PEFT stores them
    R_A = (A Aᵀ)^-½,  R_B = (Bᵀ B)^-½         (r, r), see `linalg.inverse_root`
    U_B = polar(N_B R_A) R_A                  so that U_B A, and B U_A, has singular values 1
    U_A = R_B polar(R_B N_A)
    s = sqrt(1 - lr wd);   B = s B - lr/(2 s) U_B,   A = s A - lr/(2 s) U_A

so that W decays by 1 - lr wd and each factor contributes half of the step. A factor whose partner is zero does not
move; it has no gradient either. So A waits for the first step of B, which PEFT starts at zero.

N (b, m, r) or (b, r, n) is one factor's momentum. `Seen.gram` (b, r, r) is its partner's Gram matrix before the step;
``gram_side`` is the side along which r lies. May import torch, `linalg`, `checks` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Scalar
from ..linalg.inverse_root import inverse_root
from ..linalg.products import multiply
from .polar import Polar
from .proposal import Proposal
from .request import Asks, OnWholeMatrices
from .seen import Seen


@dataclass(frozen=True)
class Pair(Polar):
    """Options of LoRAMuon: those of the polar factor."""

    dealable: ClassVar[bool] = True
    paired: ClassVar[bool] = True

    def split(self, rate: Scalar, decay: Scalar) -> tuple[Scalar, Scalar]:
        if not isinstance(decay, Tensor) and decay <= 0:
            raise ValueError(f"lr · weight_decay is {1 - decay}; it must be below 1, or W would decay to 0 or below")
        root = decay**0.5
        return rate / (2 * root), root

    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks:
        assert seen.gram is not None
        root = inverse_root(seen.gram).to(torch.promote_types(seen.N.dtype, torch.float32))

        def by_root(x: Tensor) -> Tensor:
            x = x.to(root.dtype)
            return multiply(root, x) if seen.gram_side == "rows" else multiply(x, root)

        factor = self.factor(shape, seen.N)
        polar = yield OnWholeMatrices(factor, by_root(seen.formed(sized=False)), over="both")
        return Proposal(full=by_root(polar))
