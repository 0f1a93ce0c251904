"""State that is kept in 8 bits: decoded before an update and encoded after it, so that no rule knows of it.

If columns are sharded, the maxima of blocks are exchanged: see `linalg.eight_bits`. May import torch, `linalg`,
`slots`, `parts` and this room.
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
    """Return the state as rules see it, for ``weights`` of this dtype: what is in 8 bits
    becomes new tensors of numbers."""
    wide = torch.promote_types(weights, torch.float32)
    found = {name: x for name, x in state.items() if not name.endswith(SCALES)}
    for name, slot in encoded(slots):
        found[name] = decode(state[name], state[name + SCALES], _across(slot, part)[0], wide)
    return found


def close(state: State, slots: Slots, numbers: State, transport: Transport) -> Task:
    """Encode ``numbers``, which came from `opened`, into 8 bits again. They are overwritten."""
    for name, slot in encoded(slots):
        x, scale, (first, length) = numbers[name], state[name + SCALES], _across(slot, transport.part)
        largest = largest_of_blocks(x, length, first)
        if slot.dims and slot.dims[1] == "columns":
            largest = yield from transport.largest(largest, over="columns")
        scale.copy_(scales(largest))
        encode_(state[name], x, scale, first)


def encoded(slots: Slots) -> Iterator[tuple[str, Slot]]:
    """Yield the names and slots of the state that is in 8 bits."""
    return ((name, slot) for name, slot in slots.items() if slot.dtype == torch.int8)


def _across(slot: Slot, part: Part) -> tuple[int, int]:
    """Return the first column that this rank has of the rows of a state, and the number of columns of a whole row:
    those of the matrix, or the rank columns of Q, which are never sharded."""
    columns = slot.dims[1] if slot.dims else "columns"
    return (0, columns) if isinstance(columns, int) else (part.columns.first, part.columns.length)
