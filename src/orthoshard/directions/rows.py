"""RowNorm's direction: every row of N at one length (RMNP, arXiv 2603.20527; Nora, 2605.03769).

    rows       U_i = N_i / |N_i|                                        RMNP
    tangent    T_i = N_i - <N_i, W_i> / |W_i|² W_i,   U_i = T_i / |T_i|     Nora: no step along the row of W itself

N, W, U (b, m, n). If rows are sharded, nothing is sent; if columns are, one number per row is summed, two for Nora.
With the scale "original" the length of a row is max(1, m/n)^½, as in RMNP.
May import torch, `linalg`, `checks` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import switch
from ..linalg.accumulate import blocks
from .direction import Direction
from .proposal import Proposal
from .request import Asks, Sum
from .seen import Seen

# A row of T no longer than this many roundings of its row of N is rounding, and does not move.
CANCELLATION = 32.0


@dataclass(frozen=True)
class Rows(Direction):
    """Options of RowNorm. ``tangent``: Nora's form."""

    linear: ClassVar[bool] = False  # the length of a mean is not the mean of lengths
    dealable: ClassVar[bool] = False  # only numbers travel

    tangent: bool = False

    def __post_init__(self) -> None:
        switch("tangent", self.tangent)

    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks:
        squares = yield from seen.row_squares()
        if not self.tangent:
            lengths = _inverse(squares, torch.zeros_like(squares))
            return Proposal(rows=lengths, full=seen, squares=(squares > 0).to(squares.dtype))
        X = seen.formed()
        numbers = [_along(x, w.to(x.dtype)) for x, w in zip(blocks(X, seen.weights), seen.weights, strict=True)]
        along, of_weight = (
            yield Sum(torch.cat([squares.new_zeros(0, X.shape[1], 2), *numbers]), over="columns")
        ).split(1, dim=-1)
        share = torch.where(of_weight > 0, along / of_weight, 0)
        left = squares - share * along  # |T_i|² by Pythagoras
        lengths = _inverse(left, CANCELLATION * torch.finfo(left.dtype).eps * squares)
        T = torch.empty_like(X)
        for t, x, w, s in zip(*(blocks(y, seen.weights) for y in (T, X)), seen.weights, blocks(share, seen.weights),
                              strict=True):  # fmt: skip
            torch.sub(x, (w.to(s.dtype) * s).to(x.dtype), out=t)
        return Proposal(rows=lengths, full=T, squares=(lengths > 0).to(lengths.dtype))


def _along(x: Tensor, w: Tensor) -> Tensor:
    """Return <x_i, w_i> and |w_i|² of each row, (e, m, 2), at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, w = x.to(wide), w.to(wide)
    return torch.stack([(x * w).sum(-1), w.square().sum(-1)], -1)


def _inverse(squares: Tensor, least: Tensor) -> Tensor:
    """Return 1 / length of each row, 0 if its square is no more than ``least``."""
    return torch.where(squares > least, squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt(), 0)
