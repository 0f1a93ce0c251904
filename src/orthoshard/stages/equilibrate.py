"""Equilibration: bring rows, columns or both of N to one length before the direction, by scale vectors.

    rows       s_i = 1 / |N_i|                              MuonEq-R (arXiv 2603.28254)
    columns    c_j = 1 / |N_·j|                             MuonEq-C
    both       s_i = |N_i|^-½,  c_j = |N_·j|^-½             D_r^-½ N D_c^-½
    the direction sees diag(s) N diag(c), which is not formed: see `directions.seen`

N (b, m, n), s (b, m, 1), c (b, 1, n). A zero row or column stays zero. The direction does not depend on the size of
what it sees, so no mean is kept. May import torch, `directions`, `checks` and this room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import one_of
from ..directions.request import Asks
from ..directions.seen import Seen
from .stage import Batch, Stage

SIDES = ("none", "rows", "columns", "both")


@dataclass(frozen=True)
class Equilibrate(Stage):
    """``equilibrate``: whether rows, columns, both or none are brought to one length."""

    order: ClassVar[int] = 10
    linear: ClassVar[bool] = False  # row lengths of the mean gradient are not means of row lengths

    equilibrate: str = "none"

    def __post_init__(self) -> None:
        one_of("equilibrate", self.equilibrate, SIDES)

    @property
    def on(self) -> bool:
        return self.equilibrate != "none"

    def prepare(self, seen: Seen, batch: Batch) -> Asks:
        rows = columns = None
        power = 0.25 if self.equilibrate == "both" else 0.5
        if self.equilibrate != "columns":
            rows = _inverse((yield from seen.row_squares()), power)
        if self.equilibrate != "rows":
            columns = _inverse((yield from seen.column_squares()), power)
        return replace(seen, rows=rows, columns=columns)


def _inverse(squares: Tensor, power: float) -> Tensor:
    return torch.where(squares > 0, squares.pow(-power), 0)
