"""State that is kept in 8 bits: opened before an update and closed after it, so that no rule knows of it.

Where columns are cut, the maxima of blocks are exchanged: see `linalg.eight_bits`. May import torch, `linalg`, `slots`,
`parts` and this room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..linalg.eight_bits import decode, encode_, largest_of_blocks, scales
from ..parts import Part
from ..slots import SCALES, Slot
from .gather import Task
from .transport import Transport

State = Mapping[str, Tensor]
Slots = Mapping[str, Slot]


def opened(state: State, slots: Slots, part: Part, weights: torch.dtype) -> dict[str, Tensor]:
    """The state as rules see it, for ``weights`` of this dtype: what is in 8 bits as numbers, new tensors."""
    wide = torch.promote_types(weights, torch.float32)
    found = {name: x for name, x in state.items() if not name.endswith(SCALES)}
    for name, slot in encoded(slots):
        found[name] = decode(state[name], state[name + SCALES], _across(slot, part)[0], wide)
    return found


def close(state: State, slots: Slots, numbers: State, transport: Transport) -> Task:
    """Bring ``numbers``, which were `opened`, back into 8 bits. They are overwritten."""
    for name, slot in encoded(slots):
        x, scale, (first, length) = numbers[name], state[name + SCALES], _across(slot, transport.part)
        largest = largest_of_blocks(x, length, first)
        if slot.dims and slot.dims[1] == "columns":
            largest = yield from transport.largest(largest, over="columns")
        scale.copy_(scales(largest))
        encode_(state[name], x, scale, first)


def encoded(slots: Slots) -> Iterator[tuple[str, Slot]]:
    """What is in 8 bits."""
    return ((name, slot) for name, slot in slots.items() if slot.dtype == torch.int8)


def _across(slot: Slot, part: Part) -> tuple[int, int]:
    """From which column on a rank has the rows of this state, and how many columns these have whole: those of the
    matrix, or of Q, which nothing cuts."""
    columns = slot.dims[1] if slot.dims else "columns"
    return (0, columns) if isinstance(columns, int) else (part.columns.first, part.columns.length)
