"""What every elementwise rule is: frozen options, state of the parameter's shape, and one step in place.

Such a rule needs no other rank: it steps on local pieces. May import torch, `rule`, `checks` and `linalg`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import Options
from ..linalg.found_inf import FoundInf
from ..linalg.rounding import Rounding
from ..rule import Rule


@dataclass(slots=True)
class Entries:
    """Parameters that step together, local pieces of any shape.

    weights    written in place
    gradients  one for each weight
    state      a list for each slot
    rounding   one for each weight, to write a float32 result to it; None: to nearest, or nothing to round
    skip       if given, only the device knows whether the step is taken; if it is not, nothing may change
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]
    rounding: Sequence[Rounding] | None = None
    skip: FoundInf | None = None


@dataclass(frozen=True)
class ElementwiseRule(Rule, Options):
    """One rule of entries; ``name`` is its key in `rules.RULES`."""

    name: ClassVar[str]
    matrices: ClassVar[bool] = False
    paired: ClassVar[bool] = False

    @abstractmethod
    def step(self, entries: Entries) -> None:
        """Take one step, in place."""
