"""The optimizer under the names of its rules.

May import `optimizer`.
"""

from __future__ import annotations

from .optimizer import RuleOptimizer


class Dion(RuleOptimizer):
    """Dion (Ahn, Xu, Abreu, Langford, arXiv 2504.05295): low-rank orthonormalized updates with error feedback.

    ``Dion(model, lr=0.02, rank_fraction=0.25)``. Matrices go to Dion, everything else to AdamW or Lion; see
    `RuleOptimizer` for ``params``, and `orthoshard.rules.DionRule` for the options and their defaults.
    State of an (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r), or (n, r) with ``q_side="columns"``.
    """

    default_rule = "dion"


class DionTail(RuleOptimizer):
    """Dion with its remainder applied at once, at unit row length, in place of error feedback; see `docs/dion_tail.md`.

    ``DionTail(model, lr=0.02, rank_fraction=0.25)``. See `RuleOptimizer` for ``params``, and
    `orthoshard.rules.DionTailRule` for the options and their defaults.
    State of an (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r).
    """

    default_rule = "dion_tail"


class Muon(RuleOptimizer):
    """Muon (K. Jordan, 2024): momentum orthogonalized by Newton-Schulz.

    ``Muon(model, lr=0.02)``. See `RuleOptimizer` for ``params``, and `orthoshard.rules.MuonRule` for the options and
    their defaults. State of an (m, n) matrix: ``momentum`` (m, n).
    """

    default_rule = "muon"
