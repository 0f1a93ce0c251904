"""Coefficients of Polar Express (Amsel, Persson, Musco, Gower: arXiv 2505.16932), derived rather than copied.

A step maps every singular value x to p(x) = a x + b x^3 + c x^5. If the singular values lie in [l, u], the best p is
the minimizer of max |1 - p(x)| over [l, u]. It maps them into [p(l), 2 - p(l)], and the next step is derived for that
interval. The minimizer equioscillates (Chebyshev): with q < s the two stationary points of p,

    p(l) = 1 - E,   p(q) = 1 + E,   p(s) = 1 - E,   p(u) = 1 + E,

four equations that are linear in (a, b, c, E) while q and s are held fixed. Alternating with new q and s is Remez'
algorithm.

The paper has two safeguards. First, the interval is never taken wider than [``cushion`` u, u]: on a wider one E is
almost 1, and p maps singular values near s almost to 0, where low precision loses them. p is then rescaled so that p(l)
and p(u) are centred on 1 again. Second, each step but the last divides x by ``safety``, so that rounding may lift a
singular value above u without harm. May import nothing: `orthoshard.jax` reads these tables without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Triple = tuple[float, float, float]
LIMIT: Triple = (15 / 8, -10 / 8, 3 / 8)  # the minimizer as l / u -> 1: p(1) = 1, p'(1) = p''(1) = 0


def value(p: Triple, x: float) -> float:
    a, b, c = p
    return x * (a + x * x * (b + x * x * c))


def minimax(lower: float, upper: float) -> Triple:
    """Return the odd quintic that minimizes max |1 - p(x)| over [lower, upper], by Remez' algorithm in float64."""
    if abs(upper - lower) < 1e-5 * upper:  # the four equations coincide
        a, b, c = LIMIT
        return a / upper, b / upper**3, c / upper**5
    if not 0 < lower < upper:
        raise ValueError(f"[{lower}, {upper}] is no interval of singular values: give 0 < lower < upper")
    q, s = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = math.inf
    for _ in range(64):  # it converges quadratically: about 6 are needed
        a, b, c, e = solve(
            [[x, x**3, x**5, sign, 1.0] for x, sign in ((lower, 1.0), (q, -1.0), (s, 1.0), (upper, -1.0))]
        )
        if abs(e - error) <= 1e-15:
            return a, b, c
        error = e
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))  # p'(x) = a + 3 b x^2 + 5 c x^4
        q, s = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    raise AssertionError(f"Remez' algorithm did not converge on [{lower}, {upper}]")


def solve(rows: list[list[float]]) -> list[float]:
    """Return the x of A x = b, from the rows of [A b], by elimination with pivots. So few equations need no library,
    and this file must work without torch."""
    for k in range(len(rows)):
        rows[k:] = sorted(rows[k:], key=lambda row: -abs(row[k]))
        for row in rows[k + 1 :]:
            factor = row[k] / rows[k][k]
            row[k:] = [x - factor * pivot for x, pivot in zip(row[k:], rows[k][k:], strict=True)]
    x = [0.0] * len(rows)
    for k in reversed(range(len(rows))):
        x[k] = (rows[k][-1] - sum(a * b for a, b in zip(rows[k][k + 1 : -1], x[k + 1 :], strict=True))) / rows[k][k]
    return x


def polar_express(
    lower: float = 1e-3, steps: int = 5, safety: float = 1.01, cushion: float = 0.02407327424182761
) -> tuple[Triple, ...]:
    """Return the coefficients of ``steps`` steps for singular values in [lower, 1].

    The defaults are the paper's; ``safety=1`` gives the figures that it prints.
    """
    upper = 1.0
    result: list[Triple] = []
    for step in range(steps):
        p = minimax(max(lower, cushion * upper), upper)
        centre = 2 / (value(p, lower) + value(p, upper))
        a, b, c = (centre * x for x in p)
        lower = value((a, b, c), lower)
        upper = 2 - lower
        guard = 1.0 if step == steps - 1 else safety
        result.append((a / guard, b / guard**3, c / guard**5))
    return tuple(result)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One (a, b, c) for each step, and their source."""

    steps: tuple[Triple, ...]
    source: str


def polynomials(polar: str) -> Coefficients:
    """Return the coefficients of a name in `POLAR`, or those in a text: ``"a,b,c; a,b,c"`` has two steps. Raises
    ValueError for anything else."""
    if polar in POLAR:
        return POLAR[polar]
    try:
        steps = [tuple(map(float, step.split(","))) for step in polar.split(";")]
    except (AttributeError, ValueError):
        steps = []
    if not steps or any(len(step) != 3 or not all(map(math.isfinite, step)) for step in steps):
        raise ValueError(
            f"polar={polar!r} is unknown; choose one of {', '.join(map(repr, POLAR))}, or write the coefficients of "
            f"each step, as in '3.4445,-4.775,2.0315; 2.8366,-3.0525,1.2012'"
        )
    return Coefficients(tuple((a, b, c) for a, b, c in steps), "given")


POLAR: dict[str, Coefficients] = {
    # Steep at 0 and deliberately not convergent: singular values in [0.003, 1] end in [0.68, 1.21].
    "jordan": Coefficients(
        ((3.4445, -4.7750, 2.0315),) * 5,
        "K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024",
    ),
    # Singular values in [0.003, 1] end in [0.87, 1.13], those at 0.001 above 0.85.
    "polar_express": Coefficients(
        polar_express(lower=1e-3, steps=5, safety=1.01),
        "Amsel, Persson, Musco, Gower, The Polar Express, arXiv 2505.16932, 2025; safety factor 1.01",
    ),
}
