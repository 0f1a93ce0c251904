"""What launches share: the launch itself, checks of tensors, numbers, and sizes of tiles.

May import torch, `linalg` and this room.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg.found_inf import FoundInf
from ..linalg.products import Precision, Scalar
from .device.common import INTERPRETED, TYPES

# Triton loads vectors along lengths and strides that are multiples of this. Elsewhere tiles are smaller where larger
# ones would spill registers: tests/kernels/test_compiles.py.
ALIGNED = 16


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch ``programs`` of the kernel on the device of its first tensor, which need not be the current one."""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type != "cuda":
        kernel[programs,](*arguments, **constants)
        return
    with torch.cuda.device(device):
        kernel[programs,](*arguments, **constants)


def check(*tensors: Tensor) -> None:
    """Check that kernels can treat these tensors, before anything is changed. Raises
    TypeError or ValueError otherwise."""
    for dtype, device in {(x.dtype, x.device) for x in tensors}:
        if dtype not in TYPES:
            raise TypeError(
                f"The Triton kernels know {', '.join(str(t).removeprefix('torch.') for t in TYPES)}, not {dtype}: "
                f"choose kernels='torch'."
            )
        if device.type != ("cpu" if INTERPRETED else "cuda"):
            why = (
                "with TRITON_INTERPRET set they run in Triton's interpreter, on the CPU"
                if INTERPRETED
                else "they are compiled for CUDA (TRITON_INTERPRET=1 runs them on the CPU, slowly, to test them)"
            )
            raise ValueError(f"The Triton kernels cannot treat a tensor on {device}: {why}; or kernels='torch'.")
    if torch.compiler.is_compiling():
        raise ValueError(
            "The Triton kernels take addresses of tensors, which torch.compile cannot trace: compile with "
            "kernels='torch', or step eagerly or from a CUDA graph."
        )


def wide(dtype: torch.dtype) -> Any:
    """Return the type in which kernels compute for tensors of this dtype."""
    return TYPES[torch.promote_types(dtype, torch.float32)]


def split(value: Scalar, device: torch.device) -> tuple[float, Tensor | None, int]:
    """Split a number for a kernel into a value, a tensor and a step. A number on the host is its value. If
    each matrix has its own (b, 1, 1), or reading it would stall the device, the value is 0, and the tensor has
    the numbers, a step apart."""
    if isinstance(value, Tensor) and (value.ndim or value.device.type != "cpu"):
        return 0.0, value.to(device), value.stride(0) if value.ndim else 0
    return float(value), None, 0


def number_of(skip: FoundInf | None) -> Tensor | None:
    """Return the flag as kernels read it: 1 if nothing is to change."""
    return None if skip is None else skip.number


def dot(precision: Precision | None) -> str:
    """Return how tiles of float32 are multiplied, whatever torch's setting: in TF32 if that is permitted."""
    return "ieee" if precision in (None, "float32") else "tf32"


def tile(length: int, most: int, least: int = 16) -> int:
    """Return a power of two for a dimension of this length; 16 is the least that a product of tiles takes."""
    return max(least, min(most, 1 << max(length - 1, 0).bit_length()))


def cdiv(length: int, step: int) -> int:
    """Return how many steps cover the length."""
    return -(-length // step)
