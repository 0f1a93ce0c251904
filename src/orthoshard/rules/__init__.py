"""Update rules by name. A new rule is one file and one entry here."""

from .adamw import AdamWRule
from .dion import DionRule
from .lion import LionRule
from .muon import MuonRule
from .rule import Batch, Rule, Slot

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (DionRule, MuonRule, AdamWRule, LionRule)}

__all__ = ["RULES", "AdamWRule", "Batch", "DionRule", "LionRule", "MuonRule", "Rule", "Slot"]
