"""The base of option classes, and checks of values that raise with the fix in the sentence. May import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from torch import Tensor

Scalar = float | Tensor


@dataclass(frozen=True)
class Options:
    """Options as fields; the name of each field is a key of a group."""

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the group keys that this class reads, with their defaults."""
        return {field.name: field.default for field in fields(cls)}


def non_negative(key: str, value: Scalar) -> None:
    """Refuse a value that is not a finite number, 0 or larger. A tensor must hold one number; it is not read."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{key} must be one number; it is a tensor of shape {tuple(value.shape)}")
        return  # reading it might stall a device; its value is checked when it is set
    number(key, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key}={float(value)!r} must be a finite number, 0 or larger")


def fraction(key: str, value: Any, *, zero: bool, one: bool) -> None:
    """Refuse a number outside [0, 1]; ``zero`` and ``one`` say whether the ends are allowed."""
    number(key, value)
    above = value >= 0 if zero else value > 0
    below = value <= 1 if one else value < 1
    if not (above and below):
        raise ValueError(f"{key}={value!r} is outside {'[' if zero else '('}0, 1{']' if one else ')'}")


def one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def switch(key: str, value: object) -> None:
    """Refuse a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{key}={value!r} must be True or False")


def number(key: str, value: object) -> None:
    """Refuse a value that is not a number."""
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{key}={value!r} must be a number, not {type(value).__name__}")


def betas_of(value: object) -> None:
    """Refuse a value that is not two numbers in [0, 1)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"betas={value!r} must be two numbers, such as (0.9, 0.95)")
    for beta in value:
        fraction("each of betas", beta, zero=True, one=False)
