"""The state that a parameter keeps: which dimensions of the matrix it follows, in which dtype. May import torch and
`linalg`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from .linalg.eight_bits import SCALE, blocks_of

# Suffix of the name of a slot's scales in 8 bits.
SCALES = "_scales"
EIGHT_BITS = "int8"
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Slot:
    """One state tensor of a parameter.

    dims   the dimensions after the batch: ``"rows"`` or ``"columns"`` of the matrix, or lengths.
           ``None``: the shape of the parameter itself. ``()``: one number.
    dtype  kept by saving and loading, whatever the parameter's dtype.
    fill   initial values: zeros, or normal entries of variance 1/q for q rows, drawn from the parameter's own seed.
    linear_in_gradient  whether the state is a sum of gradients: if replicas have gradients of their own, each holds a
           term of a mean.
    """

    dims: tuple[Literal["rows", "columns"] | int, ...] | None
    dtype: torch.dtype
    fill: Literal["zeros", "normal"] = "zeros"
    linear_in_gradient: bool = False


def state_device(parameter: torch.device, offload: bool) -> torch.device:
    """Return the device of the state of parameters on this device: the same, or the CPU if offloaded. State of
    parameters on meta stays on meta."""
    return torch.device("cpu") if offload and parameter.type != "meta" else parameter


def average_dtype(parameter: torch.dtype) -> torch.dtype:
    """Return the dtype of the averages of elementwise rules: the parameter's, but float32 for float16, in which 1e-4
    squared is zero."""
    return torch.float32 if parameter == torch.float16 else parameter


def state_dtype(name: str | None, parameter: torch.dtype) -> torch.dtype:
    """Return the dtype in which rules see a matrix's state: the named one. Without a name, or if the state is kept in
    8 bits, it is the parameter's dtype, at least float32."""
    if name is None or name == EIGHT_BITS:
        return torch.promote_types(parameter, torch.float32)
    return STATE_DTYPES[name]


def in_eight_bits(slots: dict[str, Slot], shape: tuple[int, ...]) -> dict[str, Slot]:
    """Return the slots of (m, n) matrices, each of two dimensions, in 8 bits with their scales: `linalg.eight_bits`."""
    found: dict[str, Slot] = {}
    for name, slot in slots.items():
        assert slot.dims is not None
        side, across = slot.dims
        length = across if isinstance(across, int) else shape[1]
        found[name] = replace(slot, dtype=torch.int8)
        found[name + SCALES] = Slot((side, blocks_of(length)), SCALE)
    return found
