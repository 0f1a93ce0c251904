"""What state a parameter keeps: which dimensions of the matrix it follows, in which dtype. May import torch and
`linalg`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from .linalg.eight_bits import SCALE, blocks_of

# What the scales of a slot in 8 bits are called, after its name.
SCALES = "_scales"
EIGHT_BITS = "int8"
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


def state_device(parameter: torch.device, offload: bool) -> torch.device:
    """Return where the state of parameters on this device lives: there, or in host memory; of meta, on meta."""
    return torch.device("cpu") if offload and parameter.type != "meta" else parameter


def average_dtype(parameter: torch.dtype) -> torch.dtype:
    """Return the dtype of the averages of elementwise rules: the parameter's, but float32 for float16, in which the
    square of a gradient of 1e-4 is zero."""
    return torch.float32 if parameter == torch.float16 else parameter


def state_dtype(name: str | None, parameter: torch.dtype) -> torch.dtype:
    """Return the dtype in which rules see a matrix's state: as named, or else the parameter's, but never below float32.
    What is kept in 8 bits is seen in the latter."""
    if name is None or name == EIGHT_BITS:
        return torch.promote_types(parameter, torch.float32)
    return STATE_DTYPES[name]


def in_eight_bits(slots: dict[str, Slot], shape: tuple[int, ...]) -> dict[str, Slot]:
    """The slots of (m, n) matrices, of two dimensions each, in 8 bits, with their scales: see `linalg.eight_bits`."""
    found: dict[str, Slot] = {}
    for name, slot in slots.items():
        assert slot.dims is not None
        side, across = slot.dims
        length = across if isinstance(across, int) else shape[1]
        found[name] = replace(slot, dtype=torch.int8)
        found[name + SCALES] = Slot((side, blocks_of(length)), SCALE)
    return found
