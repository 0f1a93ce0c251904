"""What state a parameter keeps: which dimensions of the matrix it follows, in which dtype. May import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Slot:
    """One state tensor of a parameter.

    dims   its dimensions after the batch: ``"rows"`` or ``"columns"`` of the matrix, or a length of its own.
           ``None``: the shape of the parameter itself. ``()``: one number.
    dtype  survives saving and loading, whatever the parameter's dtype.
    linear_in_gradient  whether it is a sum of gradients: where replicas have gradients of their own, each holds a
           term of a mean
    fill   zeros, or normal entries of variance 1/q for q rows, drawn from the parameter's own seed.
    """

    dims: tuple[Literal["rows", "columns"] | int, ...] | None
    dtype: torch.dtype
    fill: Literal["zeros", "normal"] = "zeros"
    linear_in_gradient: bool = False


def average_dtype(parameter: torch.dtype) -> torch.dtype:
    """Return the dtype of the averages of elementwise rules: the parameter's, but float32 for float16, in which the
    square of a gradient of 1e-4 is zero."""
    return torch.float32 if parameter == torch.float16 else parameter


def state_dtype(name: str | None, parameter: torch.dtype) -> torch.dtype:
    """Return the dtype of a matrix's state: as named, or else the parameter's, but never below float32."""
    if name is None:
        return torch.promote_types(parameter, torch.float32)
    return STATE_DTYPES[name]
