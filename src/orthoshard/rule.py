"""The base of every update rule: frozen options, and the state that it keeps for a parameter.

A matrix rule is a direction with stages around it (`rules.matrix`); an elementwise rule (`elementwise`) writes weights
itself. May import torch, `linalg`, `slots` and `checks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from .checks import Scalar, non_negative, one_of
from .linalg.rounding import ROUNDINGS
from .slots import Slot


@dataclass(frozen=True)
class Rule(ABC):
    """The base class of all rules. ``lr`` may be a float or a 0-d tensor. ``rounding`` of bfloat16 weights: "nearest"
    or "stochastic". Wider weights are always rounded to nearest: their rounding errors are far below an update."""

    matrices: ClassVar[bool]  # whether the rule treats a parameter as matrices, or entry by entry

    lr: Scalar
    weight_decay: Scalar
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        non_negative("lr", self.lr)
        non_negative("weight_decay", self.weight_decay)
        one_of("rounding", self.rounding, ROUNDINGS)

    @abstractmethod
    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        """Return the state of a parameter of this dtype; ``shape`` is (m, n) for matrix rules."""

    @property
    def unread(self) -> dict[str, str]:
        """Options that have no effect beside the others, each with the reason."""
        return {}

    @property
    def factors(self) -> bool:
        """Whether replicas with gradients of their own may exchange thin factors instead of gradients."""
        return False

    def decay(self) -> Scalar:
        """Return 1 - lr·wd, the factor of the weights (decoupled decay, Loshchilov & Hutter, arXiv 1711.05101)."""
        if not isinstance(self.weight_decay, torch.Tensor) and self.weight_decay == 0:
            return 1.0  # not a tensor, even if lr is one: a tensor would cost a pass over the weights
        return 1 - self.lr * self.weight_decay
