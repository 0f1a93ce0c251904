"""What every update rule is: frozen options, and the state that it keeps of a parameter.

A rule of matrices is a direction with stages round it (`rules.matrix`); an elementwise rule (`elementwise`) steps by
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
    """Common ground of all rules. ``lr`` may be a float or a 0-d tensor. ``rounding`` of bfloat16 weights: "nearest" or
    "stochastic". Wider weights are rounded to nearest in any case: their rounding is far below an update."""

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
        """State of a parameter of this dtype; ``shape`` is (m, n) for matrix rules."""

    @property
    def unread(self) -> dict[str, str]:
        """Options that nothing reads beside the others, each with the reason."""
        return {}

    @property
    def factors(self) -> bool:
        """Whether replicas with gradients of their own may exchange thin factors in place of gradients."""
        return False

    def decay(self) -> Scalar:
        """1 - lr·wd, the factor of the weights (decoupled decay, Loshchilov & Hutter, arXiv 1711.05101)."""
        if not isinstance(self.weight_decay, torch.Tensor) and self.weight_decay == 0:
            return 1.0  # a number, whatever lr is: as a tensor it would cost a pass over the weights
        return 1 - self.lr * self.weight_decay
