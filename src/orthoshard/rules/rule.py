"""What every update rule is: frozen hyperparameters, the state it keeps a parameter, and one update.

A rule knows matrices as batches (b, m, n) and never how they are cut. It says which dimension of the matrix each
dimension of its state follows; the engine does the rest. May import torch, `linalg` and `request`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg.guarded import Skip
from ..linalg.rounding import ROUNDINGS, Rounding
from .demand import Demand
from .request import Update

Scalar = float | Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """One state tensor of a parameter.

    dims   its dimensions after the batch: ``"rows"`` or ``"columns"`` of the matrix, or a length of its own.
           ``None``: the shape of the parameter itself. ``()``: one number.
    dtype  survives saving and loading, whatever the parameter's dtype.
    linear whether it is a sum of gradients: of replicas with gradients of their own each then holds a term of a mean
    fill   zeros, or normal entries of variance 1/q for q rows, drawn from the parameter's own seed.
    """

    dims: tuple[Literal["rows", "columns"] | int, ...] | None
    dtype: torch.dtype
    fill: Literal["zeros", "normal"] = "zeros"
    linear: bool = False


@dataclass(slots=True)
class Batch:
    """Parameters that take one update together, as the rule sees them: local pieces, written in place.

    weights    the parameters: (e, m, n) blocks for matrix rules, tensors of any shape for elementwise rules
    gradients  alike
    state      for matrix rules, each slot as one tensor (b, ...), b the sum of all e; for elementwise rules, a list
    shape      (m, n) of the whole matrix, however it is cut; () for elementwise rules
    rounding   one for each weight, to bring a float32 result into it; None: to nearest, or nothing to round
    skip       where given, the device alone knows whether the step is taken; if it is not, no state may change. ``lr``
               is then a tensor, 0 in such a step, and gradients may have entries that are not finite

    Where replicas keep the state of their own matrices only, gradients and state are those of these matrices, and
    weights all: see `request.Publish`.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Any]
    shape: tuple[int, ...]
    rounding: Sequence[Rounding] | None = None
    skip: Skip | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """Common ground of all rules. ``lr`` may be a float or a 0-d tensor. ``rounding`` of bfloat16 weights: "nearest" or
    "stochastic"; a rule writes its weights by `Batch.rounding` where there is any. Wider weights are rounded to nearest
    in any case: their rounding is far below an update.
    """

    name: ClassVar[str]
    factors: ClassVar[bool] = False  # whether replicas with gradients of their own may exchange factors instead
    publishes: ClassVar[bool] = False  # whether it asks by `Publish` for what its weights take
    heeds_skip: ClassVar[bool] = False  # whether its state stays as it is where `Batch.skip` says so
    matrices: ClassVar[bool]  # whether the rule treats a parameter as matrices, or entry by entry

    lr: Scalar
    weight_decay: Scalar
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        non_negative("lr", self.lr)
        non_negative("weight_decay", self.weight_decay)
        one_of("rounding", self.rounding, ROUNDINGS)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The group keys that this rule reads, with their defaults."""
        return {field.name: field.default for field in fields(cls)}

    @abstractmethod
    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        """State of a parameter of this dtype; ``shape`` is (m, n) for matrix rules."""

    @abstractmethod
    def update(self, batch: Batch) -> Update:
        """One step on a batch, in place, as a generator of requests."""

    @abstractmethod
    def demand(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cuda") -> Demand:
        """What one update of one such parameter costs on such a device; under an elementwise rule, of one entry."""

    def decay(self) -> Scalar:
        """1 - lr·wd, the factor of the weights (decoupled decay, Loshchilov & Hutter, arXiv 1711.05101)."""
        if not isinstance(self.weight_decay, Tensor) and self.weight_decay == 0:
            return 1.0  # a number, whatever lr is: as a tensor it would cost a pass over the weights
        return 1 - self.lr * self.weight_decay


def state_dtype(name: str | None, parameter: torch.dtype) -> torch.dtype:
    """The dtype of a matrix's state: as named, or else the parameter's, but never below float32."""
    if name is None:
        return torch.promote_types(parameter, torch.float32)
    return STATE_DTYPES[name]


def average_dtype(parameter: torch.dtype) -> torch.dtype:
    """The dtype of the averages of elementwise rules: the parameter's, but float32 for float16, in which the square of
    a gradient of 1e-4 is zero."""
    return torch.float32 if parameter == torch.float16 else parameter


STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# The factor of the orthonormal update of an (m, n) = (d_out, d_in) matrix.
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(m / n),  # Dion, arXiv 2504.05295 v3, Table 1
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # K. Jordan's Muon, 2024
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight, arXiv 2502.16982: the RMS of AdamW's updates
}


def non_negative(key: str, value: Scalar) -> None:
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{key} must be one number; it is a tensor of shape {tuple(value.shape)}")
        return  # reading it might stall a device; it is checked where it is set
    number(key, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key}={float(value)!r} must be a finite number, 0 or larger")


def fraction(key: str, value: Any, *, zero: bool, one: bool) -> None:
    number(key, value)
    above = value >= 0 if zero else value > 0
    below = value <= 1 if one else value < 1
    if not (above and below):
        raise ValueError(f"{key}={value!r} is outside {'[' if zero else '('}0, 1{']' if one else ')'}")


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{key}={value!r} must be a number, not {type(value).__name__}")


def betas_of(value: object) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"betas={value!r} must be two numbers, such as (0.9, 0.95)")
    for beta in value:
        fraction("each of betas", beta, zero=True, one=False)
