"""Answers to the requests of one update, by how its matrices are cut.

    Sum                 all-reduce over each axis that cuts the dimension
    Each, x cut         all-to-all: the matrices of the batch go whole to owners, f, and all-to-all back
    Each, x partial     reduce-scatter by matrices, f, all-gather
    steps of f          done together with those of the other updates in flight: see `joint`
    Sum, Each averaged  as well over replicas that bring gradients of their own
    Share               each replica its part of the batch, all-gather; or all of it, where that is cheaper
    Publish             all-gather over replicas that keep the state of their own matrices only
    Measure             all-to-all to owners, f, and its numbers all-gathered
    Note                nothing, unless somebody watches: see `notes`

Several axes are treated one after the other: the batch is dealt out along the first, each part along the second,
and so on, so that no matrix is treated twice. Every answer is a generator that yields what it waits for, mostly
collectives. Reduce-scatter and all-gather by matrices are all-to-alls whose pieces may differ in number; a ring would
send as many bytes.

Every rank yields the same number of times, whatever it holds: updates take turns by their yields, and ranks must meet
in the same order. A rank whose part is empty takes part in empty collectives.
May import torch, `rules`, `layout`, `parts` and this room.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import copy
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..layout import AVERAGE, Axis, Replicas, deal, dealt_before, passed_on
from ..parts import Part
from ..rules.request import Each, Measure, Note, Publish, Request, Share, Sum
from .comm import Comm, Pending, flat
from .gather import Answer, gather, gather_all
from .joint import Joints

Undo = Callable[[Tensor], Answer]


def drive(update: Generator[Any, Any, Any], answers: Answers | Joints | None) -> Answer:
    """Run a generator that asks to its end; returns what it returns. Yields what the answers wait for.
    ``answers`` None: of an elementwise rule, which asks nothing."""
    answer: Any = None
    while True:
        try:
            request = update.send(answer)
        except StopIteration as stop:
            return stop.value
        assert answers, "an elementwise rule has no rows and columns to ask about"
        answer = yield from answers.to(request)


def _mean_term(x: Tensor, replicas: Sequence[Axis]) -> Tensor:
    """What to sum over replicas for the mean of ``x``."""
    return x / prod(axis.size for axis in replicas) if replicas else x


class Answers:
    """Of one update. ``joints``: small steps of all updates in flight; ``dealt``: matrices dealt out before it;
    ``replicas``: what ranks do that hold the same; ``shares``: of how many matrices each keeps the state, or one
    number; ``note``: what takes a `Note`, if anybody watches."""

    def __init__(
        self,
        part: Part,
        comm: Comm,
        joints: Joints,
        dealt: int,
        replicas: Replicas,
        shares: Sequence[int],
        note: Callable[[Note, Answers], Answer] | None = None,
    ) -> None:
        self.part = part
        self.note = note
        self.shares = shares
        self.owners = part.replicas if replicas == "own" else ()
        self.comm = comm
        self.joints = joints
        self.dealt = dealt_before(dealt, self.owners)
        self.sharing = part.replicas if replicas == "split" else ()
        self.averaging = part.sources if replicas in AVERAGE else ()
        self.wire = AVERAGE.get(replicas)

    def to(self, request: Request) -> Answer:
        if isinstance(request, Sum):
            return (yield from self._sum(request))
        if isinstance(request, Each):
            return (yield from self._each(request))
        if isinstance(request, Publish):
            return (yield from gather_all(request.tensors, self.shares, self.owners, self.comm))
        if isinstance(request, Measure):
            return (yield from self._measure(request))
        if isinstance(request, Note):
            return (yield from self.note(request, self)) if self.note else None
        return (yield from self._share(request))

    def _sum(self, request: Sum) -> Answer:
        replicas = self.averaging if request.averaged else ()
        cutting = self.part.over(request.over)
        x = request.x.contiguous() if cutting or replicas else request.x
        x = _mean_term(x, replicas)
        narrow = self.wire is not None and request.over != "both"  # a sum over both leaves one number: not worth it
        for axis in (*cutting, *(() if narrow else replicas)):
            yield self.comm.all_reduce(x, axis)
        for axis in replicas if narrow else ():
            part, back = yield from self._reduce_scatter(x, axis, self.dealt, self.wire)
            x = yield from back(part)
        return x

    def _each(self, request: Each) -> Answer:
        x, back, dealt = request.x, list[Undo](), self.dealt
        replicas = self.averaging if request.averaged else ()
        x = _mean_term(x, replicas)
        for axis in self.part.over(request.partial) if request.partial else ():
            x, undo = yield from self._reduce_scatter(x, axis, dealt)
            back.append(undo)
            dealt = passed_on(dealt, axis)
        for axis in replicas:
            x, undo = yield from self._reduce_scatter(x, axis, dealt, self.wire)
            back.append(undo)
            dealt = passed_on(dealt, axis)
        for dim, lengths, axis in self._cuts(request):
            x, undo = yield from self._to_owners(x, dim, lengths, axis, dealt)
            back.append(undo)
            dealt = passed_on(dealt, axis)
        y = yield from drive(request.f(x), self.joints)
        for undo in reversed(back):
            y = yield from undo(y)
        return y

    def _measure(self, request: Measure) -> Answer:
        x, back, dealt = request.x, list[tuple[list[int], Axis]](), self.dealt
        for dim, lengths, axis in self._cuts(request):
            back.append((deal(x.shape[0], axis.size, dealt), axis))
            x, _ = yield from self._to_owners(x, dim, lengths, axis, dealt)
            dealt = passed_on(dealt, axis)
        y = request.f(x)
        for counts, axis in reversed(back):
            (y,) = yield from gather((y,), counts, axis, self.comm)
        return y

    def _cuts(self, request: Each | Measure) -> list[tuple[int, list[int], Axis]]:
        """(dimension of x, lengths of its pieces, axis) for every axis that cuts x, the innermost cut first."""
        return [
            (dim, side.pieces(i), side.axes[i])
            for dim, side in enumerate(self.part.sides(request.over), 1)
            for i in reversed(range(len(side.axes)))
        ]

    def _share(self, request: Share) -> Answer:
        first, last, counts = 0, next(t.shape[0] for t in request.inputs if t is not None), list[list[int]]()
        inside = copy(self)
        for axis in self.sharing:
            counts.append(deal(last - first, axis.size, inside.dealt))
            inside.dealt = passed_on(inside.dealt, axis)
            first += sum(counts[-1][: axis.coordinate])
            last = first + counts[-1][axis.coordinate]
        inputs = [tensor if tensor is None else tensor[first:last] for tensor in request.inputs]
        results = yield from drive(request.compute(*inputs), inside)
        for axis, count in zip(reversed(self.sharing), reversed(counts), strict=True):
            results = yield from gather(results, count, axis, self.comm)
        return results

    def _to_owners(
        self, x: Tensor, dim: int, lengths: Sequence[int], axis: Axis, dealt: int
    ) -> Generator[Pending, None, Any]:
        """x (b, ...) cut along ``dim`` -> (own, ...) whole along it, and the way back."""
        counts = deal(x.shape[0], axis.size, dealt)
        own, here = counts[axis.coordinate], axis.coordinate
        slim = x.shape[3 - dim]  # elements of one matrix for one index of `dim`
        send = [count * lengths[here] * slim for count in counts]
        receive = [own * length * slim for length in lengths]
        out = x.new_empty(sum(receive))
        yield self.comm.all_to_all(out, x.reshape(-1), receive, send, axis)
        shapes = [(own, length, slim) if dim == 1 else (own, slim, length) for length in lengths]
        whole = torch.cat([part.view(s) for part, s in zip(out.split(receive), shapes, strict=True)], dim)

        def back(y: Tensor) -> Answer:
            out = y.new_empty(sum(send))
            yield self.comm.all_to_all(out, flat(y.split(list(lengths), dim)), send, receive, axis)
            return out.view(x.shape)

        return whole, back

    def _reduce_scatter(
        self, x: Tensor, axis: Axis, dealt: int, wire: torch.dtype | None = None
    ) -> Generator[Pending, None, Any]:
        """x (b, ...), a term of a sum over the axis -> the finished sums of this rank's matrices, and the way back.
        Terms and results travel as ``wire`` and are added up as what they are."""
        dtype, x = x.dtype, x.to(wire or x.dtype)
        counts = deal(x.shape[0], axis.size, dealt)
        own, size = counts[axis.coordinate], x[:1].numel() if x.shape[0] else 0
        out = x.new_empty((axis.size, own, *x.shape[1:]))
        send = [count * size for count in counts]
        yield self.comm.all_to_all(out.view(-1), x.reshape(-1), [own * size] * axis.size, send, axis)

        def back(y: Tensor) -> Answer:
            (whole,) = yield from gather((y.to(wire or y.dtype),), counts, axis, self.comm)
            return whole.to(y.dtype)

        return out.sum(0, dtype=dtype), back
