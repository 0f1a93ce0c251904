"""What a direction or a stage may request from the engine: two things.

Directions and stages are generators over a batch of matrices that may be sharded. They compute on the local shard and
yield a request whenever the mathematics needs more than that; the engine sends the answer back.

    x = yield Sum(x, over="columns")               finish a sum over a dimension that may be sharded
    y = yield OnWholeMatrices(f, x, over="rows")   f needs whole matrices: apply it once to each, cut the result as x

On one process a request is answered at once; on sharded matrices it becomes a collective. May import torch and
`linalg.small`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..linalg.small import Work

Dim = Literal["rows", "columns", "both"]


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of ``x`` over the ranks that hold the other pieces of a dimension of the matrix, ``over``: ``"rows"``,
    ``"columns"`` or ``"both"``. To finish a sum along a row, use ``over="columns"``.

    ``x`` has any shape with the batch first. All ranks that share the sum get the same bits back. The engine may reuse
    the memory of ``x``. ``linear_in_gradient``: means over replicas commute with x, so if replicas have gradients of
    their own, the mean over replicas is taken as well.
    """

    x: Tensor
    over: Dim
    linear_in_gradient: bool = False


@dataclass(frozen=True, slots=True)
class OnWholeMatrices:
    """``f`` applied to whole matrices, to each one once on some rank, with the result shared.

    ``x`` (b, p, q) is this rank's piece of b matrices. ``over`` names the dimension of the weight that the rows of
    ``x`` follow; ``"both"``: x is sharded as the weight itself. ``partial`` names a dimension of the weight over which
    ``x`` has still to be summed. ``linear_in_gradient`` is as in `Sum`. ``f`` maps a batch (b', p, q) of whole
    matrices to the same shape, matrix by matrix, and the answer is sharded as ``x`` was. ``f`` is a generator, which
    may yield steps on small matrices (`linalg.small`): equally many on every rank, with or without a matrix.
    ``at_once`` makes one of a function.
    """

    f: Callable[[Tensor], Work]
    x: Tensor
    over: Dim
    partial: Dim | None = None
    linear_in_gradient: bool = False


Request = Sum | OnWholeMatrices
# A generator of requests. Its users say what it returns.
Asks = Generator[Request, Any, Any]
