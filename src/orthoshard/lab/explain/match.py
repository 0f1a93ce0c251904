"""The learning rate at which an orthonormal update is as large as the AdamW update that it replaces.

    AdamW          |ΔW|_F = eta rho sqrt(m n)          rho the RMS of its update's entries, about 0.2
    orthonormal    |ΔW|_F = eta' s(m, n) sqrt(d)       d = min(m, n) singular values of 1, s the scale convention
    one matrix     eta' = eta rho sqrt(max(m, n)) / s(m, n)
    all matrices   eta' = eta rho sqrt(Σ m n / Σ s² d)     the update of the whole model has the same norm
    decay          eta' wd' = eta wd                   weights shrink as much in a step

Under s = 0.2 sqrt(max(m, n)) ("rms") every matrix has eta' = eta, which is the purpose of that convention. Moonlight
(arXiv 2502.16982, section 2.2) measured rho: "usually around 0.2 to 0.4". May import torch and ``orthoshard``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orthoshard.grouping import Claim
from orthoshard.rules import SCALES
from orthoshard.views import read_view

# The RMS of the entries of AdamW's update, over lr: Moonlight, arXiv 2502.16982, section 2.2.
ADAMW_RMS = 0.2


@dataclass(frozen=True)
class Matrices:
    """``count`` matrices of one shape."""

    m: int
    n: int
    count: int

    @property
    def entries(self) -> int:
        return self.count * self.m * self.n


def matrices_of(claims: Sequence[Claim]) -> list[Matrices]:
    """Return the matrices of these parameters, every block and expert as one; those with the most entries first."""
    counts = Counter[tuple[int, int]]()
    for claim in claims:
        shape = tuple(claim.parameter.shape)
        view = read_view(claim.view, shape)
        experts = math.prod(shape[: view.batch_dims])
        for rows in view.sides("rows"):
            for columns in view.sides("columns"):
                counts[rows.length, columns.length] += experts
    found = [Matrices(m, n, count) for (m, n), count in counts.items()]
    return sorted(found, key=lambda matrices: -matrices.entries)


def matched_lr(adamw_lr: float, scale: str, m: int, n: int) -> float:
    """Return the learning rate that matches AdamW's for one (m, n) matrix."""
    return adamw_lr * ADAMW_RMS * math.sqrt(max(m, n)) / SCALES[scale](m, n)


def common_lr(adamw_lr: float, scale: str, matrices: Sequence[Matrices]) -> float:
    """Return one learning rate for all matrices, at which the norm of the whole update is AdamW's."""
    theirs = sum(each.entries for each in matrices)
    ours = sum(each.count * SCALES[scale](each.m, each.n) ** 2 * min(each.m, each.n) for each in matrices)
    return adamw_lr * ADAMW_RMS * math.sqrt(theirs / ours)


def matched_decay(adamw_lr: float, weight_decay: float, lr: float) -> float:
    """Return the weight decay that shrinks weights at ``lr`` as much per step as AdamW's did."""
    return weight_decay * adamw_lr / lr if lr else weight_decay
