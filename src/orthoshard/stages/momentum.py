"""Momentum: how N, what the direction sees, comes from the gradient.

    heavy ball        M = mu M + G;    N = M                                                  (Polyak, 1964)
    Nesterov          M = mu M + G;    N = G + mu M, held over 1 + mu
    error feedback    M = M + G;       N = M;    and afterwards M -= (1 - mu) (what was applied)
                                                (Dion, arXiv 2504.05295; Dion3, arXiv 2608.11612)

M, N, G (b, m, n). Under Nesterov N takes the place of M in memory until the weights are written, which saves a tensor
and a sweep: `linalg.accumulate.look_ahead`. May import torch, `linalg`, `directions`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import Options, fraction, switch
from ..directions.proposal import Proposal
from ..directions.seen import Seen, inverse
from ..linalg.accumulate import Product, accumulate, blocks, look_ahead, look_back
from ..linalg.products import Precision
from ..slots import Slot
from .stage import Batch


@dataclass(frozen=True)
class Momentum(Options):
    """``momentum`` is mu. ``nesterov`` and ``error_feedback`` exclude each other: the first applies G a second time,
    which is not in M; the second takes what was applied out of M."""

    momentum: float = 0.95
    nesterov: bool = False
    error_feedback: bool = False

    def __post_init__(self) -> None:
        fraction("momentum", self.momentum, zero=True, one=False)
        switch("nesterov", self.nesterov)
        switch("error_feedback", self.error_feedback)
        if self.nesterov and self.error_feedback:
            raise ValueError(
                "nesterov=True does not go with error_feedback=True: error feedback takes what was applied out of the "
                "momentum, and Nesterov applies the gradient once more than the momentum holds it; set one to False"
            )

    def slots(self, kept: torch.dtype) -> dict[str, Slot]:
        return {"momentum": Slot(("rows", "columns"), kept, linear_in_gradient=True)}

    def look(self, batch: Batch, precision: Precision | None) -> tuple[Seen, Tensor]:
        """Accumulate. Return what the direction sees, and the size of this rank's piece of each matrix, (b, 1, 1)."""
        M = batch.state["momentum"]
        if self._ahead:
            N, size, squares = look_ahead(M, batch.gradients, self.momentum, batch.skip)
            return Seen(N, precision, local=squares), size
        kept = 1.0 if self.error_feedback else self.momentum
        return Seen(M, precision), accumulate(M, batch.gradients, kept, batch.skip)

    def settle(self, seen: Seen, batch: Batch) -> Callable[[slice], None] | None:
        """Return a function that restores M from what took its place, for some blocks of ``batch.gradients``; None if M
        is intact. The function may run as soon as the weights of these blocks are written."""
        M = batch.state["momentum"]
        if not self._ahead or seen.N is not M:
            return None
        held = list(blocks(M, batch.gradients))
        return lambda some: look_back(held[some], batch.gradients[some], self.momentum, batch.skip)

    def taken(self, proposal: Proposal, seen: Seen) -> Product | None:
        """Return what error feedback takes out of M if the direction is of low rank: alpha a L
        Rᵀ, a being the size of N."""
        if not self.error_feedback or proposal.captured is None:
            return None
        left, right = proposal.left, proposal.right
        assert left is not None
        assert right is not None
        # The lengths go into the factor that is not orthonormal, the size into the other one: neither overflows.
        if proposal.orthonormal == "right":
            left = (left * proposal.captured).to(left.dtype)
        else:
            right = (right * proposal.captured).to(right.dtype)
        if seen.rows is not None:
            left = (left * inverse(seen.rows)).to(left.dtype)
        if seen.columns is not None:
            right = (right * inverse(seen.columns).mT).to(right.dtype)
        uneven = seen.rows is not None or seen.columns is not None
        return Product(left, right, self.momentum - 1, seen.size, proposal.orthonormal or "right", uneven)

    def take_formed(self, proposal: Proposal, seen: Seen, batch: Batch) -> None:
        """Apply error feedback that is not a product: take out a part that was formed, or multiply
        selected rows or columns by mu."""
        M = batch.state["momentum"]
        if self.error_feedback and proposal.withheld is not None:
            withheld = proposal.withheld if seen.size is None else proposal.withheld * seen.size
            for scale in (seen.rows, seen.columns):
                withheld = withheld if scale is None else (withheld * inverse(scale)).to(withheld.dtype)
            if batch.skip is not None:
                withheld = torch.where(batch.skip.flag, 0, withheld)
            M.add_(withheld, alpha=self.momentum - 1)
        if self.error_feedback and proposal.selected is not None:
            selected = proposal.selected.to(M.dtype)
            if batch.skip is not None:
                selected = torch.where(batch.skip.flag, 0, selected)
            M.mul_(1 - (1 - self.momentum) * selected)

    @property
    def _ahead(self) -> bool:
        return self.nesterov and self.momentum > 0
