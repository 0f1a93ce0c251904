"""Answers the requests of one update, according to how its matrices are sharded.

    Sum                 all-reduce over each axis that shards the dimension
    OnWholeMatrices     x sharded: all-to-all (the matrices of the batch go whole to owners), f, all-to-all back
                        x partial: reduce-scatter by matrices, f, all-gather
    steps of f          done together with those of the other updates in flight: see `batcher`
    linear_in_gradient  the same also over replicas that have gradients of their own
    largest             all-reduce of maxima over each axis that shards the dimension
    measured            all-to-all to owners, f, and all-gather of its numbers

Several axes are treated one after the other: the batch is dealt out along the first, each part along the second,
and so on, so that no matrix is treated twice. Every answer is a generator that yields what it waits for, mostly
collectives.

Every rank yields the same number of times, whatever it holds: updates take turns by their yields, and ranks must start
their collectives in the same order. A rank whose part is empty takes part in empty collectives.
May import torch, `directions`, `layout`, `owners`, `parts` and this room.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..directions.request import Dim, OnWholeMatrices, Sum
from ..layout import AVERAGE, Axis, Replicas
from ..owners import first_owner_within, next_owner, split_counts
from ..parts import Part
from .batcher import CallBatcher
from .comm import Comm, Pending, flat, in_order
from .gather import Task, gather, gather_all, reduce_scatter

Undo = Callable[[Tensor], Task]
# Which side of the matrix each dimension after the batch follows: "rows" or "columns"; any other word means neither.
Follows = tuple[str, str]
# What replicas with equal gradients do if each takes its part of the batch.
SPLIT: Replicas = "split"


def drive(update: Generator[Any, Any, Any], transport: Transport | CallBatcher) -> Task:
    """Run a generator of requests to its end and return what it returns. Yield what the answers wait for."""
    answer: Any = None
    while True:
        try:
            answering = transport.to(update.send(answer))
        except StopIteration as stop:
            return stop.value
        answer = None  # drop it before more arrives: tensors here may be large
        answer = yield from answering


def _mean_term(x: Tensor, replicas: Sequence[Axis]) -> Tensor:
    """Return this replica's term of the mean of ``x`` over replicas."""
    return x / prod(axis.size for axis in replicas) if replicas else x


class Transport:
    """Answers the requests of one update.

    batcher      r x r calls of all updates in flight
    first_owner  which rank gets the first matrix
    replicas     what ranks that hold the same matrices do
    shares       if they divide the state among themselves, how many matrices each keeps
    """

    def __init__(
        self,
        part: Part,
        comm: Comm,
        batcher: CallBatcher,
        first_owner: int,
        replicas: Replicas,
        shares: Sequence[int] = (),
    ) -> None:
        self.part = part
        self.shares = shares
        self.owners = part.replicas if replicas == "own" else ()
        self.comm = comm
        self.batcher = batcher
        self.first_owner = first_owner_within(first_owner, self.owners)
        self.sharing = part.replicas if replicas == SPLIT else ()
        self.averaging = part.unreduced_axes if replicas in AVERAGE else ()
        self.wire = AVERAGE.get(replicas)

    def to(self, request: Sum | OnWholeMatrices) -> Task:
        """Answer a request."""
        return self._sum(request) if isinstance(request, Sum) else self._on_whole_matrices(request)

    def run(self, asks: Any) -> Task:
        """Run a generator of requests to its end. Code that makes no request may pass its
        result instead of a generator."""
        return (yield from drive(asks, self)) if isinstance(asks, Generator) else asks

    def gather_from_owners(self, tensors: Sequence[Tensor]) -> Task:
        """Gather what the owners of state computed, for all weights: all-gather over the
        replicas that divide the state."""
        return (yield from gather_all(tensors, self.shares, self.owners, self.comm))

    def split(self, count: int) -> tuple[Transport, int, int, Callable[[Sequence[Tensor]], Task]]:
        """Deal ``count`` matrices out to replicas that hold the same. Return the transport within one replica's part,
        the part's first matrix and the one after its last, and a function that joins the results of all parts."""
        first, last, counts = 0, count, list[list[int]]()
        inside = copy(self)
        inside.sharing = ()
        for axis in self.sharing:
            counts.append(split_counts(last - first, axis.size, inside.first_owner))
            inside.first_owner = next_owner(inside.first_owner, axis)
            first += sum(counts[-1][: axis.coordinate])
            last = first + counts[-1][axis.coordinate]

        def join(results: Sequence[Tensor]) -> Task:
            for axis, along in zip(reversed(self.sharing), reversed(counts), strict=True):
                results = yield from gather(results, along, axis, self.comm)
            return results

        return inside, first, last, join

    def whole(self) -> Transport:
        """Return the transport of an owner, which has whole matrices and sends nothing."""
        inside = copy(self)
        inside.part = replace(self.part, rows=self.part.rows.uncut(), columns=self.part.columns.uncut())
        return inside

    def to_owners(self, tensors: Sequence[tuple[Tensor, Follows]]) -> Task:
        """Bring local pieces of a batch whole to owners. Each tensor comes with the sides of the matrix
        that its dimensions follow. Return the whole tensors, and a function that brings tensors from owners
        back to where the pieces were."""
        xs, back, owner = list(tensors), list[tuple[Axis, str, list[int], list[int]]](), self.first_owner
        for side in ("columns", "rows"):  # rows last: pieces of one matrix then arrive in memory order
            for i in reversed(range(len(self.part.side(side).axes))):
                axis, lengths = self.part.side(side).axes[i], self.part.side(side).pieces(i)
                counts = split_counts(xs[0][0].shape[0], axis.size, owner)
                first = sum(counts[: axis.coordinate])
                for number, (x, follows) in enumerate(xs):
                    if side in follows:
                        x = yield from self._deal(x, 1 + follows.index(side), lengths, axis, counts)
                    else:
                        x = x[first : first + counts[axis.coordinate]]
                    xs[number] = (x, follows)
                back.append((axis, side, lengths, counts))
                owner = next_owner(owner, axis)

        def undo(results: Sequence[tuple[Tensor, Follows]]) -> Task:
            found = list[Tensor]()
            for y, follows in results:
                for axis, side, lengths, counts in reversed(back):
                    if side in follows:
                        y = yield from self._undeal(y, 1 + follows.index(side), lengths, axis, counts)
                    else:
                        (y,) = yield from gather((y,), counts, axis, self.comm)
                found.append(y)
            return found

        return [x for x, _ in xs], undo

    def largest(self, x: Tensor, over: Dim) -> Task:
        """Take the maximum of ``x``, entry by entry and in place, over the ranks that hold the
        other pieces of this dimension."""
        for axis in self.part.over(over):
            yield self.comm.all_reduce(x, axis, "max")
        return x

    def measured(self, f: Callable[[Tensor], Tensor], x: Tensor, over: Dim) -> Task:
        """Apply ``f``, which maps whole matrices (b', p, q) to k numbers each (b', k). Return the numbers of all
        matrices (b, k). ``x`` and ``over`` are as in `OnWholeMatrices`."""
        back, owner = list[tuple[list[int], Axis]](), self.first_owner
        for dim, lengths, axis in self._sharded_dims(over):
            counts = split_counts(x.shape[0], axis.size, owner)
            x = yield from self._deal(x, dim, lengths, axis, counts)
            back.append((counts, axis))
            owner = next_owner(owner, axis)
        y = f(x)
        for counts, axis in reversed(back):
            (y,) = yield from gather((y,), counts, axis, self.comm)
        return y

    def _sum(self, request: Sum) -> Task:
        replicas = self.averaging if request.linear_in_gradient else ()
        cutting = self.part.over(request.over)
        x = request.x.contiguous() if cutting or replicas else request.x
        x = _mean_term(x, replicas)
        narrow = self.wire is not None and request.over != "both"  # a sum over both is one number: not worth it
        for axis in (*cutting, *(() if narrow else replicas)):
            yield self.comm.all_reduce(x, axis)
        for axis in replicas if narrow else ():
            # by elements: no rank has to own whole matrices here
            count, even = x.numel(), [-(-x.numel() // axis.size)] * axis.size
            piece, back = yield from self._reduce_scatter(in_order(x), axis, even, self.wire)
            x = (yield from back(piece))[:count].view(x.shape)
        return x

    def _on_whole_matrices(self, request: OnWholeMatrices) -> Task:
        f, x, over, back, owner = request.f, request.x, request.over, list[Undo](), self.first_owner
        replicas = self.averaging if request.linear_in_gradient else ()
        partly = self.part.over(request.partial) if request.partial else ()
        del request
        x = _mean_term(x, replicas)
        for axis in partly:
            counts = split_counts(x.shape[0], axis.size, owner)
            x, undo = yield from self._reduce_scatter(x, axis, counts)
            back.append(undo)
            owner = next_owner(owner, axis)
        for axis in replicas:
            counts = split_counts(x.shape[0], axis.size, owner)
            x, undo = yield from self._reduce_scatter(x, axis, counts, self.wire)
            back.append(undo)
            owner = next_owner(owner, axis)
        for dim, lengths, axis in self._sharded_dims(over):
            counts = split_counts(x.shape[0], axis.size, owner)
            x = yield from self._deal(x, dim, lengths, axis, counts)
            back.append(partial(self._undeal, dim=dim, lengths=lengths, axis=axis, counts=counts))
            owner = next_owner(owner, axis)
        work = f(x)
        del x
        y = yield from drive(work, self.batcher)
        for undo in reversed(back):
            y = yield from undo(y)
        return y

    def _sharded_dims(self, over: Dim) -> list[tuple[int, list[int], Axis]]:
        """Return (dimension of x, lengths of its pieces, axis) for every axis that shards
        x, the innermost cut first."""
        return [
            (dim, side.pieces(i), side.axes[i])
            for dim, side in enumerate(self.part.sides(over), 1)
            for i in reversed(range(len(side.axes)))
        ]

    def _deal(self, x: Tensor, dim: int, lengths: Sequence[int], axis: Axis, counts: Sequence[int]) -> Task:
        """Exchange x (b, ...), sharded along ``dim``, for (own, ...), whole along it; each
        rank gets ``counts`` matrices."""
        own, here = counts[axis.coordinate], axis.coordinate
        slim = x.shape[3 - dim]  # elements of one matrix for one index of `dim`
        send = [count * lengths[here] * slim for count in counts]
        receive = [own * length * slim for length in lengths]
        out = x.new_empty(sum(receive))
        yield self.comm.all_to_all(out, in_order(x), receive, send, axis)
        if dim == 1 and own <= 1:
            return out.view(own, sum(lengths), slim)
        shapes = [(own, length, slim) if dim == 1 else (own, slim, length) for length in lengths]
        return torch.cat([part.view(s) for part, s in zip(out.split(receive), shapes, strict=True)], dim)

    def _undeal(self, y: Tensor, dim: int, lengths: Sequence[int], axis: Axis, counts: Sequence[int]) -> Task:
        """Exchange y (own, ...), whole along ``dim``, for (b, ...), sharded along it: the inverse of `_deal`."""
        own, here, slim = counts[axis.coordinate], axis.coordinate, y.shape[3 - dim]
        send = [count * lengths[here] * slim for count in counts]
        receive = [own * length * slim for length in lengths]
        out = y.new_empty(sum(send))
        y = in_order(y) if dim == 1 and own <= 1 else flat(y.split(list(lengths), dim))
        yield self.comm.all_to_all(out, y, send, receive, axis)
        length = lengths[here]
        return out.view(sum(counts), length, slim) if dim == 1 else out.view(sum(counts), slim, length)

    def _reduce_scatter(
        self, x: Tensor, axis: Axis, counts: Sequence[int], wire: torch.dtype | None = None
    ) -> Generator[Pending, None, Any]:
        """Sum x (b, ...) over the axis. Return the finished sums of this rank's ``counts`` matrices, and the way back.
        Terms and results travel as ``wire`` and are added up in their own dtype."""
        out = yield from reduce_scatter(x.to(wire or x.dtype), counts, axis, self.comm, x.dtype)

        def back(y: Tensor) -> Task:
            (whole,) = yield from gather((y.to(wire or y.dtype),), counts, axis, self.comm)
            return whole.to(y.dtype)

        return out, back
