"""Gradients that are placed otherwise than their parameters, moved to the parameters' placements.

Autograd leaves such gradients under tensor parallelism: an unfinished sum (`Partial`) for a norm whose input is sharded
along the sequence, a whole gradient for an embedding that is sharded by rows. The pieces of all ranks are added up,

    G = sum over ranks of (the local piece, in zeros where other ranks have theirs; or the local term of a sum),

over only those axes that differ, and each rank keeps its piece of G. No rank decides alone on a collective:
ranks first agree on how each gradient is placed, and a rank that has no gradient adds zero. May import
torch, `layout` and this room.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import Axis, Layout, Misplaced, local_gradient, meshes_of
from .comm import Comm
from .gather import finish
from .gradients import check_gradient
from .replicas import summed


class Found(NamedTuple):
    """The gradient of a parameter on this rank: its local piece, if there is one, never modified; its placement, if
    that is not its parameter's; or why it cannot be taken."""

    local: Tensor | None = None
    misplaced: Misplaced | None = None
    refusal: Exception | None = None

    @property
    def usual(self) -> bool:
        return self.local is not None and self.misplaced is None


@dataclass(frozen=True)
class Places:
    """What ranks know of how their gradients are placed.

    moves    for each parameter, what to do with its gradient; None: nothing
    unclear  parameters whose gradients are placed in different ways on different ranks, if this rank needs to know
    flags    one per mesh, known to the device alone: whether any gradient is unclear, or cannot be taken by some rank
    """

    moves: list[Move | None]
    unclear: list[int]
    flags: list[Tensor]


@dataclass(frozen=True)
class Move:
    """What all ranks do with one gradient: make these dimensions whole, then sum over these axes."""

    dims: tuple[int, ...]
    axes: tuple[Axis, ...]


def find_gradient(parameter: Tensor, name: str) -> Found:
    """Find the parameter's gradient, of any dtype in `TRAINABLE`. It is refused if it is sparse, has another dtype, is
    left from before the parameter was replaced, or cannot be moved to where the parameter is."""
    gradient = parameter.grad
    if gradient is None:
        return Found()
    try:
        check_gradient(gradient, parameter, name)
        return Found(*local_gradient(name, parameter, gradient))
    except (RuntimeError, ValueError) as error:
        return Found(refusal=error)


def agree_on_moves(layouts: Sequence[Layout], found: Sequence[Found], weights: Sequence[Tensor], comm: Comm) -> Places:
    """Agree on how gradients are placed: three numbers per parameter, of which every rank gets the largest.

    A rank on which every gradient exists and is placed as its parameter cannot help the others: it sends its numbers
    and reads none, so that it does not wait for the device.
    """
    places = Places([None] * len(layouts), [], [])
    for axes, members in meshes_of(layouts):
        device = weights[members[0]].device
        usual = all(found[i].usual for i in members)
        if usual:
            numbers = torch.zeros(3 * len(members), dtype=torch.float64, device=device)  # what `_describe` returns
        else:
            described = [number for i in members for number in _describe(found[i], layouts[i])]
            numbers = torch.tensor(described, dtype=torch.float64, device=device)
        digests, negatives, codes = comm.reduced(numbers, axes, "max").view(-1, 3).unbind(1)
        unclear = (digests != -negatives) & (codes > -math.inf)
        places.flags.append(unclear.any())
        if usual:
            continue
        for i, other, code in zip(members, unclear.tolist(), codes.tolist(), strict=True):
            if other:
                places.unclear.append(i)
            elif code > 0:
                places.moves[i] = _decoded(int(code), layouts[i])
    return places


def _describe(found: Found, layout: Layout) -> tuple[float, float, float]:
    """Describe a gradient by three numbers: a digest, its negative, and its dimensions and axes as bits. If all ranks
    agree, their maxima are the numbers of any rank. A gradient placed as its parameter has 0, 0, 0."""
    if found.refusal:
        return math.inf, math.inf, 0.0
    if found.local is None:
        return -math.inf, -math.inf, -math.inf
    if found.misplaced is None:
        return 0.0, 0.0, 0.0
    dims, axes = found.misplaced.dims, [layout.axes.index(axis) for axis in found.misplaced.axes]
    code = sum(1 << dim for dim in dims) + sum(1 << len(layout.shape) + axis for axis in axes)
    text = f"{code} {found.misplaced.text}"
    digest = 1 + float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))
    return digest, -digest, float(code)


def _decoded(code: int, layout: Layout) -> Move:
    dims = tuple(dim for dim in range(len(layout.shape)) if code >> dim & 1)
    axes = tuple(axis for i, axis in enumerate(layout.axes, len(layout.shape)) if code >> i & 1)
    return Move(dims, axes)


def moved(
    layouts: Sequence[Layout],
    found: Sequence[Found],
    moves: Sequence[Move | None],
    weights: Sequence[Tensor],
    comm: Comm,
) -> list[Tensor | None]:
    """Return the local piece of each gradient, placed as its parameter; None if no rank that adds to its sum has one.
    ``weights``: local pieces of the parameters."""
    pieces = [each.local for each in found]
    sums: dict[tuple[Axis, ...], list[int]] = {}
    for i, move in enumerate(moves):
        if move is None:
            continue
        if move.axes:
            pieces[i] = _in_zeros(found[i], layouts[i], move, weights[i])
            sums.setdefault(move.axes, []).append(i)
    for axes, members in sums.items():
        terms = [piece for i in members if (piece := pieces[i]) is not None]
        for i, total in zip(members, finish(summed(terms, axes, comm)), strict=True):
            pieces[i] = total
    for i, move in enumerate(moves):
        piece = pieces[i]
        if move is not None and piece is not None:
            for dim in move.dims:
                piece = piece.narrow(dim, *layouts[i].local_slices[dim])
            pieces[i] = piece
    return pieces


def _in_zeros(found: Found, layout: Layout, move: Move, weight: Tensor) -> Tensor:
    """Return what this rank adds: its piece at its place in the dimensions that are made whole, zeros elsewhere."""
    shape = [layout.shape[d] if d in move.dims else layout.local[d] for d in range(len(layout.shape))]
    total = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))  # the same on all ranks
    if found.local is not None and found.misplaced is not None:
        here = total
        for dim in move.dims:
            here = here.narrow(dim, *found.misplaced.local_slices[dim])
        here.copy_(found.local / found.misplaced.terms)
    return total
