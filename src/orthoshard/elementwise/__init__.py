"""Rules that treat a parameter entry by entry. One file each; a new one is one file and one entry of `rules.RULES`."""

from .adamw import AdamWRule
from .elementwise import ElementwiseRule, Entries
from .lion import LionRule

__all__ = ["AdamWRule", "ElementwiseRule", "Entries", "LionRule"]
