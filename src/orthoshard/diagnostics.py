"""Figures of the update of each matrix parameter, as `RuleOptimizer.diagnostics` returns them.

The engine delivers sums over all matrices of a parameter (blocks of a view, experts), on all ranks. A figure is a mean
or a root mean square over these matrices: one number for each parameter, the same on every layout.
Means of shares of energy leave out matrices that were zero. May import the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Spectra are kept at these rank fractions: closely spaced at low ranks, 1/64 apart above. Thousands of values for each
# matrix would fill a log, and what one reads off a spectrum is a rank fraction, rounded up to the next of these.
FRACTIONS = (1 / 512, 1 / 256, 3 / 512, 1 / 128, *(k / 64 for k in range(1, 65)))


@dataclass(frozen=True)
class Figures:
    """The figures of one parameter at one step.

    "Input" is what the rule saw: the momentum with the new gradient, looked ahead under Nesterov.

    matrices          number of matrices of the parameter
    rank, live        columns of the factors, and how many of them were above noise; means over the matrices. Under a
                      rule of full rank: the smaller side, and None
    captured          share of the input's squared Frobenius norm that rank r captured. None under a rule of full rank
    effective_rank    of the input: see `linalg.spectrum`
    tail_flatness     effective rank of the remainder that rank r did not capture, as a share of the d - r directions
                      that the remainder can have: 1 if all are equally strong. None without a remainder, and under a
                      rule of full rank
    orthogonality     |PᵀP - I| / sqrt(r), Frobenius, of the factor that should be orthonormal; under Muon, of the whole
                      update's direction
    basis             the same for the new Q, whose columns Dion only scales to unit length; None under Muon
    update_rms        root mean square of the entries subtracted from the weights, with learning rate and scale,
                      without weight decay
    spectrum          share of the input that the best approximation captures at each rank fraction of `FRACTIONS`; None
                      if spectra were not requested
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
    """Return the figures of a parameter from sums over its matrices; ``spread``: sums of shares at each fraction."""
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
