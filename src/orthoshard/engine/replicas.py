"""Replicas with gradients of their own: averaging what must be averaged, and detecting gradients that already are.

May import torch, `plan`, `layout` and `comm`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import prod

import torch
from torch import Tensor

from ..layout import AVERAGE, Axis
from ..plan import Entry, Plan
from .comm import Comm, Pending, Together, flat

# Gradients travel in pieces of about this size, so that the first arrive while the last are still being sent.
PIECE_BYTES = 32 * 2**20


def averaged(gradients: Sequence[Tensor], axes: Sequence[Axis], comm: Comm) -> Generator[Pending, None, list[Tensor]]:
    """Return the means of the gradients over the axes, as new tensors."""
    return (yield from summed(gradients, axes, comm, prod(axis.size for axis in axes)))


def summed(
    tensors: Sequence[Tensor], axes: Sequence[Axis], comm: Comm, terms: int = 1
) -> Generator[Pending, None, list[Tensor]]:
    """Return the sums of the tensors over the axes, each term divided by ``terms`` first, as new tensors. All pieces
    are sent at once and waited for once: their number differs between shards, and every rank
    must yield equally often."""
    pieces = list(_pieces(tensors))
    sums = [flat(piece).div_(terms) for piece in pieces]
    for axis in axes:
        yield Together([comm.all_reduce(total, axis) for total in sums])
    found: list[Tensor] = []
    for piece, total in zip(pieces, sums, strict=True):
        parts = total.split([tensor.numel() for tensor in piece])
        found += [part.view(tensor.shape) for part, tensor in zip(parts, piece, strict=True)]
    return found


def _pieces(gradients: Sequence[Tensor]) -> Generator[list[Tensor]]:
    """Yield lists of consecutive gradients of one dtype, up to a size."""
    piece, size = list[Tensor](), 0
    for gradient in gradients:
        bytes_here = gradient.numel() * gradient.element_size()
        if piece and (size + bytes_here > PIECE_BYTES or gradient.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(gradient)
        size += bytes_here
    if piece:
        yield piece


def check_own(plan: Plan, gradients: Sequence[Tensor | None], comm: Comm) -> bool:
    """Check that gradients that should differ between replicas do. If all are equal, they were averaged already.

    Raises RuntimeError on every rank in that case, because the optimizer would average again. Returns False if all are
    zero, so that nothing can be told.
    """
    members = [i for i, entry in enumerate(plan.entries) if entry.layout.unreduced_axes]
    sources = plan.entries[members[0]].layout.unreduced_axes
    sums = [_checksum(gradients[i], plan.entries[i]) for i in members]
    high, low = comm.reduced(torch.stack([*sums, *(-s for s in sums)]), sources, "max").view(2, -1)
    seen = torch.stack([(high != -low).any(), (high != 0).any()]).double()
    comm.reduced(seen, own_axes(plan), "max")  # shards look at different pieces
    differ, there = (bool(flag) for flag in seen.tolist())
    if there and not differ:
        raise RuntimeError(
            f"every gradient is the same on all ranks of {', '.join(map(str, sources))}: they are averaged already, "
            f"and replica_sync would average them again. Run forward and backward within "
            f"orthoshard.local_gradients(model) (under FSDP2, give fully_shard the shard mesh alone), or leave "
            f"replica_sync out"
        )
    return there


def own_axes(plan: Plan) -> list[Axis]:
    """Return every axis of the parameters whose gradients are their replica's own, in an order that all ranks share."""
    found = {axis for entry in plan.entries if entry.layout.unreduced_axes for axis in entry.layout.axes}
    return sorted(found, key=lambda axis: axis.key)


def check_equal(plan: Plan, weights: Sequence[Tensor], comm: Comm) -> None:
    """Check that parameters have the same bits on all replicas.

    Raises RuntimeError on every rank otherwise, naming the first parameter that differs.
    """
    found: dict[tuple[Axis, ...], list[int]] = {}
    for i, entry in enumerate(plan.entries):
        if entry.layout.replicas:
            found.setdefault(entry.layout.replicas, []).append(i)
    for axes, members in found.items():
        sums = torch.stack([_bits(weights[i]) for i in members])
        values = comm.reduced(torch.cat([sums, -sums]), axes, "max")
        for i, high, low in zip(members, *values.view(2, -1).tolist(), strict=True):
            if high != -low:
                raise RuntimeError(
                    f"parameter {plan.entries[i].name!r} is no longer the same on all ranks of "
                    f"{', '.join(map(str, axes))}: something has changed it on one of them. Go on from the last "
                    f"checkpoint, and look for a rank with other settings or faulty memory"
                )


def average_state(plan: Plan, held: Sequence[dict[str, Tensor]], comm: Comm) -> list[dict[str, Tensor]]:
    """Return, for each entry, the state that is a mean over replicas of which each holds a term:
    local pieces, new tensors."""
    means: list[dict[str, Tensor]] = []
    for bucket in plan.buckets:
        for entry in bucket.entries:
            own = any(update.replicas in AVERAGE for update in bucket.updates)
            terms = [name for name, slot in entry.slots if slot.linear_in_gradient] if own else []
            mine = held[len(means)]
            ranks = prod(axis.size for axis in entry.layout.unreduced_axes)
            mean = {name: mine[name].to(entry.device) / ranks for name in terms}
            for tensor in mean.values():
                comm.reduced(tensor, entry.layout.unreduced_axes)
            means.append(mean)
    return means


def _checksum(gradient: Tensor | None, entry: Entry) -> Tensor:
    if gradient is None or not gradient.numel():
        return torch.zeros((), dtype=torch.float64, device=entry.device)
    return gradient.sum(dtype=torch.float64)


def _bits(weight: Tensor) -> Tensor:
    """Return a sum over the bits of a tensor that shows a change of one entry; 52 bits of
    it, which float64 can hold."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    words = weight.detach().contiguous().view(integers).flatten()
    total = words.sum(dtype=torch.int64)
    return (total & (2**52 - 1)).double()
