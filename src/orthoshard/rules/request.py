"""What a rule may ask of the engine while it updates a batch of matrices that may be cut into shards.

A rule is a generator. It computes on the local shard and yields a request wherever the mathematics needs more
than that; the engine sends the answer back. In one process every answer is immediate.

    x = yield Sum(x, over="columns")           finish a contraction over a dimension that may be cut
    y = yield Each(f, x, over="rows")          f needs whole matrices: do each once, somewhere; share the result
    y, z = yield Share(g, (u, v))              where replicas hold the same batch, each does its part of it; g is
                                               itself a generator, and its results are shared
    s = yield Measure(f, x, over="rows")       some numbers of whole matrices; all ranks get them
    yield Note(x, g, (u, v))                   what may be shown of the update, should anybody watch
    y, z = yield Publish((y, z))               what all weights take, of a batch whose state is here

May import torch and `linalg.small`.
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
    """The sum of ``x`` over the ranks that hold the other pieces of the named dimension of the matrix.

    ``x`` has any shape with the batch first; all ranks that share the sum get the same bits back. The engine may
    reuse the memory of ``x``. ``averaged``: x is linear in the gradients, so that where replicas bring gradients of
    their own, the mean over replicas is meant as well.
    """

    x: Tensor
    over: Dim
    averaged: bool = False


@dataclass(frozen=True, slots=True)
class Each:
    """``f`` applied to whole matrices, each one treated once somewhere and shared.

    ``x`` (b, p, q) is this rank's piece of b matrices. ``over`` names the dimension of the weight that the rows of
    ``x`` follow; ``"both"``: x is cut as the weight itself. ``partial`` names a dimension of the weight over which
    ``x`` has still to be summed; ``averaged`` is as in `Sum`. ``f`` maps a batch (b', p, q) of whole matrices to the
    same shape, matrix by matrix; the answer is cut as ``x`` was. It is a generator, which may yield steps on small
    matrices (`linalg.small`): as many on every rank, with or without a matrix. ``at_once`` makes one of a function.
    """

    f: Callable[[Tensor], Work]
    x: Tensor
    over: Dim
    partial: Dim | None = None
    averaged: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """``compute`` on a part of the batch at each replica. Answered by the tuple of its results for the whole batch.

    ``inputs`` are tensors with the batch first, equal on all replicas, or None; ``compute`` gets their slices, may
    yield requests of its own, and returns a tuple of tensors with the batch first.
    """

    compute: Callable[..., Generator[Any, Any, tuple[Tensor, ...]]]
    inputs: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """What the weights take, asked once, right before they are written. Answered by the same for all weights.

    Each of ``tensors`` has the batch of the state first. Where replicas keep the state of their own matrices only, a
    rule sees the gradients and state of these, but the weights of all: it gets back what the owners of all others
    published.
    """

    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """``f`` maps whole matrices (b', p, q) to k numbers of each, (b', k); answered by those of all matrices, (b, k).

    Each matrix is treated once, somewhere. ``x`` and ``over`` are as in `Each`.
    """

    f: Callable[[Tensor], Tensor]
    x: Tensor
    over: Dim


@dataclass(frozen=True, slots=True)
class Note:
    """What a rule shows of its update. Where nobody watches it is passed over, and nothing of it is computed.

    ``seen`` (b, m, n), cut as the weight, is what the direction was made from; it is linear in the gradients, so that
    replicas with gradients of their own show their mean. ``figures``, a generator like a rule's, gets ``inputs`` and
    returns numbers of each matrix, (b,), by name: see `rules.figures`. It may change nothing.
    """

    seen: Tensor
    figures: Callable[..., Shown]
    inputs: tuple[Any, ...]


Request = Sum | Each | Share | Publish | Measure | Note
Update = Generator[Request, Any, None]
Part = Generator[Sum | Each | Measure, Any, tuple[Tensor, ...]]
Shown = Generator[Sum | Measure, Any, dict[str, Tensor]]
