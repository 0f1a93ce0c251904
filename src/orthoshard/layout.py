"""Where a parameter's matrices live. The only file that knows DTensor.

One process: every matrix is whole. May import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class MatrixLayout:
    """A parameter as ``batch`` matrices of (rows, columns), whole here."""

    batch: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return "whole"


def matrix_layout(name: str, parameter: Tensor) -> MatrixLayout:
    """The layout of a 2-D or 3-D parameter. Raises ValueError where it is no matrix."""
    if isinstance(parameter, DTensor):
        raise ValueError(f"parameter {name!r} is a DTensor; this version treats parameters that are whole on each rank")
    if parameter.ndim not in (2, 3):
        raise ValueError(
            f"parameter {name!r} has shape {tuple(parameter.shape)}, which is no matrix. Pass the model itself, so "
            f"that groups are made for you (Dion(model)), or put it in a group of its own with rule='adamw'"
        )
    *batch, rows, columns = parameter.shape
    return MatrixLayout(batch[0] if batch else 1, rows, columns)
