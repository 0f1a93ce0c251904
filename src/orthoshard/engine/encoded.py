"""State that is kept in 8 bits: opened before an update and closed after it, so that no rule knows of it.

Where columns are cut, the maxima of blocks are exchanged: see `linalg.eight_bits`. May import torch, `linalg`, `slots`,
`parts` and this room.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..linalg.eight_bits import decode, encode_, largest_of_blocks, scales
from ..parts import Part
from ..slots import SCALES
from .gather import Task
from .transport import Transport

State = Mapping[str, Tensor]


def opened(state: State, part: Part, weights: torch.dtype) -> dict[str, Tensor]:
    """The state as rules see it, for ``weights`` of this dtype: what is in 8 bits as numbers, new tensors."""
    wide = torch.promote_types(weights, torch.float32)
    found = {name: x for name, x in state.items() if not name.endswith(SCALES)}
    for name in encoded(state):
        found[name] = decode(state[name], state[name + SCALES], part.columns.first, wide)
    return found


def close(state: State, numbers: State, transport: Transport) -> Task:
    """Bring ``numbers``, which were `opened`, back into 8 bits. They are overwritten."""
    columns = transport.part.columns
    for name in encoded(state):
        x, scale = numbers[name], state[name + SCALES]
        largest = yield from transport.largest(largest_of_blocks(x, columns.length, columns.first), over="columns")
        scale.copy_(scales(largest))
        encode_(state[name], x, scale, columns.first)


def encoded(state: State) -> list[str]:
    """The names of what is in 8 bits."""
    return [name for name, x in state.items() if x.dtype == torch.int8]
