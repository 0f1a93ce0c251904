"""What a rule may ask of the engine while it updates a batch of matrices that may be cut into shards.

A rule is a generator. It computes on the local shard and yields a request wherever the mathematics needs more
than that; the engine sends the answer back. In one process every answer is immediate.

    x = yield Sum(x, over="columns")     finish a contraction over a dimension that may be cut
    y = yield Each(f, x, over="rows")    f needs whole matrices: do each once, somewhere; share the result

May import torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Dim = Literal["rows", "columns", "both"]


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of ``x`` over the ranks that hold the other pieces of the named dimension of the matrix.

    ``x`` has any shape with the batch first; all ranks that share the sum get the same bits back. The engine may
    reuse the memory of ``x``.
    """

    x: Tensor
    over: Dim


@dataclass(frozen=True, slots=True)
class Each:
    """``f`` applied to whole matrices, each one treated once somewhere and shared.

    ``x`` is (b, p, q), the local piece of b matrices. ``over`` names the dimension of the *matrix* along which the
    rows of ``x`` (``"rows"``), its columns (``"columns"``) or both are cut; ``None`` says that every rank
    of the shard group holds the same ``x`` already. ``f`` maps (b, p, q) to a tensor of the same shape, matrix by
    matrix. ``partial`` says that ``x`` still has to be summed over that dimension first: ``Each(f, Sum)`` in one.
    """

    f: Callable[[Tensor], Tensor]
    x: Tensor
    over: Dim | None = None
    partial: Dim | None = None


Request = Sum | Each
Update = Generator[Request, Tensor, None]
