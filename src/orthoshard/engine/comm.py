"""The only collectives: sums and maxima over an axis, whole or in even pieces, and exchanges of uneven pieces.

All are asynchronous and counted. ``bytes`` adds up what this rank sends. An all-reduce of B bytes over a ranks
sends 2 B (a - 1) / a, as a ring does (Patarasuk & Yuan, 2009, section 3); its two halves, reduce-scatter and
all-gather, send B (a - 1) / a each; an all-to-all sends everything that is not for the rank itself.
May import torch, `layout` and `linalg.host_sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import Axis
from ..linalg.host_sync import dry_once

OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def _named(name: str, before: str) -> Any:
    """Return a function of torch.distributed: by its new name, or by the old one, of which torch 2.13 warns."""
    return getattr(dist, name, None) or getattr(dist, before)


_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
_all_gather = _named("all_gather_single", "all_gather_into_tensor")


class Pending:
    """What an update waits for: a collective under way, or nothing if ``work`` is None."""

    def __init__(self, work: Any, what: str) -> None:
        self._work = work
        self._what = what

    def wait(self) -> None:
        """Wait for the collective. Raises RuntimeError if another rank has gone or time is up, naming what was waited
        for. Under NCCL only the device waits, and nothing is raised here: NCCL's watchdog ends the process."""
        if self._work is None:
            return
        try:
            self._work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"the optimizer waited for {self._what}, and it failed: {error}") from error


class Together(Pending):
    """Several collectives under way, waited for as one."""

    def __init__(self, pendings: Sequence[Pending]) -> None:
        super().__init__(None, "")
        self._pendings = pendings

    def wait(self) -> None:
        for pending in self._pendings:
            pending.wait()


class Comm:
    """The collectives of one optimizer, with their count."""

    def __init__(self) -> None:
        self.bytes = Fraction(0)
        self.calls = 0

    def all_reduce(self, x: Tensor, axis: Axis, op: str = "sum") -> Pending:
        """Replace x (contiguous) by its sum or maximum over the axis."""
        assert x.is_contiguous()  # ranks add up memory and ignore strides
        if not x.numel():
            return Pending(None, "")  # empty for every rank of the axis
        self._count(Fraction(2 * (axis.size - 1) * x.numel() * x.element_size(), axis.size))
        what = f"the {op} of {tuple(x.shape)} {x.dtype}"
        return self._start(what, axis, lambda: dist.all_reduce(x, OPS[op], group=axis.group, async_op=True))

    def reduced(self, x: Tensor, axes: Sequence[Axis], op: str = "sum") -> Tensor:
        """Do the same over several axes, one after the other, and wait for each. Returns x."""
        for axis in axes:
            self.all_reduce(x, axis, op).wait()
        return x

    def all_to_all(self, out: Tensor, x: Tensor, receive: Sequence[int], send: Sequence[int], axis: Axis) -> Pending:
        """Exchange pieces: flat x holds ``send`` elements for each rank, flat out gets ``receive`` from each."""
        assert x.is_contiguous()  # backends refuse other tensors, and on this rank alone
        self._count(Fraction((x.numel() - send[axis.coordinate]) * x.element_size()))
        what = f"an exchange of {x.dtype} matrices"
        return self._start(
            what,
            axis,
            lambda: dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group, async_op=True),
        )

    def reduce_scatter(self, out: Tensor, x: Tensor, axis: Axis) -> Pending:
        """Sum flat x over the axis. Of as many even pieces of the sum as there are ranks, out gets this rank's."""
        assert x.is_contiguous()
        assert x.numel() == axis.size * out.numel()
        what = f"the sum in pieces of {x.dtype} matrices"
        return self._even(what, out.numel(), x, axis, lambda: _reduce_scatter(out, x, group=axis.group, async_op=True))

    def all_gather(self, out: Tensor, x: Tensor, axis: Axis) -> Pending:
        """Gather the x of every rank of the axis, all equally long, into flat out, in the order of the ranks."""
        assert x.is_contiguous()
        assert out.numel() == axis.size * x.numel()
        what = f"the pieces of {x.dtype} matrices"
        return self._even(what, x.numel(), x, axis, lambda: _all_gather(out, x, group=axis.group, async_op=True))

    def _even(self, what: str, piece: int, x: Tensor, axis: Axis, call: Callable[[], Any]) -> Pending:
        if not piece:
            return Pending(None, "")  # empty for every rank of the axis
        self._count(Fraction((axis.size - 1) * piece * x.element_size()))
        return self._start(what, axis, call)

    def _count(self, sent: Fraction) -> None:
        self.bytes += sent
        self.calls += 1

    def _start(self, what: str, axis: Axis, call: Callable[[], Any]) -> Pending:
        try:
            return Pending(call(), f"{what} over {axis}")
        except RuntimeError as error:
            raise RuntimeError(f"the optimizer could not start {what} over {axis}: {error}") from error


def in_order(x: Tensor) -> Tensor:
    """Return x as a flat buffer. (Reshaped alone, one column of a matrix stays a view with gaps.)"""
    return x.reshape(-1).contiguous()


@dry_once
def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return several tensors as one flat buffer."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
