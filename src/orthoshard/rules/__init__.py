"""Update rules by name. A new rule is one file and one entry here."""

from .adamw import AdamWRule
from .dion import DionRule
from .dion_tail import DionTailRule
from .lion import LionRule
from .muon import MuonRule
from .rule import Batch, Rule, Slot

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (DionRule, DionTailRule, MuonRule, AdamWRule, LionRule)}


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule of your own known by its name, as a decorator; before an optimizer with that name is built."""
    if RULES.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"there is a rule {rule.name!r} already; give yours another name")
    return rule


__all__ = [
    "RULES",
    "AdamWRule",
    "Batch",
    "DionRule",
    "DionTailRule",
    "LionRule",
    "MuonRule",
    "Rule",
    "Slot",
    "register",
]
