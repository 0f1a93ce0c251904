"""Orthonormal columns P (b, m, r) of a batch Y (b, m, r), by name: the rules choose a method as a value.

All methods return P in Y's dtype, or in float32 where Y is narrower: rounding P would undo its orthonormality.

 - P is what QR with R_jj > 0 would give, whatever the size of Y, from denormal to the largest number.
 - Column j is zero where Y_j is within rounding of the columns before it; the other columns are then
   orthonormal, and as they would be without column j. So a zero Y gives zero, and m < r at most m columns.
   Rounding is that of Y's dtype, 16 roundings of each column in float32: see `columns`.
 - ``floor``, (b, 1, 1) or (b, 1, r): the norm of the error of each column of Y where it is more than rounding; or a
   number: that share of the longest column. Columns whose norm is at or below it, and directions that such errors
   could have made, are zero as well.
 - A column smaller than 2^-50 of the largest entry of its matrix counts as zero.
 - Matrices of a batch do not affect each other.

`cholesky_qr` is the fast one and the default; `householder` is its oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from orthoshard.linalg.cholesky import cholesky_qr, cholesky_qr_work
from orthoshard.linalg.columns import Floor
from orthoshard.linalg.householder import householder
from orthoshard.linalg.small import Small, Work, answered, at_once, finished

__all__ = [
    "ORTHONORMAL",
    "WORK",
    "Orthonormalize",
    "cholesky_qr",
    "householder",
]


class Orthonormalize(Protocol):
    def __call__(self, y: Tensor, floor: Floor = None) -> Tensor: ...


# Generators, which yield what may be done for several batches at once: see `small`.
WORK: dict[str, Callable[[Tensor, Floor], Work]] = {
    "householder": at_once(householder),
    "cholesky_qr": cholesky_qr_work,
}


def _function(work: Callable[[Tensor, Floor], Work]) -> Orthonormalize:
    def orthonormal(y: Tensor, floor: Floor = None) -> Tensor:
        return finished(answered(work(y, floor), Small, Small.done))

    return orthonormal


# The same as functions.
ORTHONORMAL: dict[str, Orthonormalize] = {name: _function(work) for name, work in WORK.items()}
