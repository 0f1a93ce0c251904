"""Figures of the update of each matrix parameter, as `RuleOptimizer.diagnostics` returns them.

The engine hands over sums over the matrices of a parameter (blocks of a view, experts), wherever these are; a figure
is a mean or a root mean square over them, so that it is one number for each parameter on every layout. Matrices that
were zero take no part in what is a share of their energy. May import the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Rank fractions at which spectra are kept: fine where ranks are low, 1/64 apart above. A spectrum of thousands of
# values for each matrix would fill a log; what is read off it is a rank fraction, rounded up to the next of these.
FRACTIONS = (1 / 512, 1 / 256, 3 / 512, 1 / 128, *(k / 64 for k in range(1, 65)))


@dataclass(frozen=True)
class Figures:
    """The figures of one parameter at one step.

    matrices          how many it is
    rank, live        columns of the factors, and how many of them were above noise; means over the matrices. Under a
                      rule of full rank, the smaller side, and None
    captured          what rank r captured of what the rule saw (momentum, with the new gradient, looked ahead under
                      Nesterov), as a share of its squared Frobenius norm. None under a rule of full rank
    effective_rank    of what the rule saw: see `linalg.spectrum`
    tail_flatness     the effective rank of what rank r did not capture, as a share of the d - r directions that it may
                      have: 1 where all of them are alike. None where there are none, and under a rule of full rank
    orthogonality     |PᵀP - I| / sqrt(r), Frobenius: of the exactly orthonormal factor; of the whole update's direction
                      under Muon
    basis             the same of the new Q, whose columns Dion only brings to unit length; None under Muon
    update_rms        root mean square over the entries of what was taken from the weights, learning rate and scale
                      included, weight decay left out
    spectrum          the share that the best approximation captures, at each rank fraction of `FRACTIONS`; None where
                      spectra were not asked for
    """

    matrices: int
    rank: float
    live: float | None
    captured: float | None
    effective_rank: float | None
    tail_flatness: float | None
    orthogonality: float
    basis: float | None
    update_rms: float
    spectrum: tuple[float, ...] | None


def figures(sums: Mapping[str, float], spread: Sequence[float] | None) -> Figures:
    """Sums over the matrices of a parameter to figures; ``spread``: of their shares at each rank fraction."""
    matrices, seen, rank = sums["matrices"], sums["seen"], sums["rank"]

    def share(key: str) -> float | None:
        return sums[key] / seen if seen and key in sums else None

    return Figures(
        matrices=round(matrices),
        rank=rank / matrices,
        live=sums["live"] / matrices if "live" in sums else None,
        captured=share("captured"),
        effective_rank=share("effective_rank"),
        tail_flatness=sums["tail_flatness"] / sums["tails"] if sums.get("tails") else None,
        orthogonality=math.sqrt(sums["orthogonality"] / rank),
        basis=math.sqrt(sums["basis"] / rank) if "basis" in sums else None,
        update_rms=math.sqrt(sums["update"] / sums["entries"]),
        spectrum=tuple(value / seen for value in spread) if spread is not None and seen else None,
    )
