"""Update rules by name: a direction with its own defaults, or an elementwise rule.

A new rule is one entry here, or `register`; its components are in `directions`, `stages` and `elementwise`.
"""

from __future__ import annotations

from typing import Any

from ..directions import Dion, DionTail, Pair, Polar, Rows, Select
from ..elementwise import AdamWRule, ElementwiseRule, LionRule
from ..rule import Rule
from .matrix import SCALES, MatrixRule, MatrixRuleType

# Muon's defaults are those of K. Jordan, 2024; Dion's those of its paper (v3, section 4 and appendix D).
MUON = {"nesterov": True, "scale": "original"}

RuleType = MatrixRuleType | type[ElementwiseRule]

RULES: dict[str, RuleType] = {
    rule.name: rule
    for rule in (
        MatrixRuleType("dion", Dion, {"error_feedback": True}),
        MatrixRuleType("dion_tail", DionTail, {"nesterov": True}),
        MatrixRuleType("muon", Polar, MUON),
        MatrixRuleType("normuon", Polar, {**MUON, "row_moment": 0.95}),
        MatrixRuleType("dion3", Select, {"error_feedback": True, "scale": "original", "row_moment": 0.95}),
        MatrixRuleType("row_norm", Rows, {"nesterov": True, "scale": "original", "lr": 3e-3}),
        MatrixRuleType("lora_muon", Pair, {"scale": "original"}),
        AdamWRule,
        LionRule,
    )
}
# The rules that exist without a plugin; those of `compat` are registered when it is imported.
OWN = frozenset(RULES) | {"dion2", "nordion2"}


def register(rule: Any) -> Any:
    """Register a rule of your own under its name, before an optimizer with that name is built: a `MatrixRuleType`, or a
    subclass of `ElementwiseRule`. Raises ValueError if the name is taken."""
    if RULES.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"there is a rule {rule.name!r} already; give yours another name")
    return rule


__all__ = ["OWN", "RULES", "SCALES", "MatrixRule", "MatrixRuleType", "Rule", "RuleType", "register"]
