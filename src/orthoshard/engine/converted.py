"""State that continues in another dtype: 8 bits to numbers, and numbers to 8 bits.

May import torch, `slots`, `parts`, `plan` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..parts import BOTH
from ..plan import Entry, Plan
from ..slots import SCALES
from .batcher import CallBatcher
from .comm import Comm
from .encoded import State, close, encoded, opened
from .gather import finish
from .storage import Storage
from .transport import Transport

# The state of each parameter, by its name.
Numbers = dict[str, State]
Groups = Sequence[dict[str, Any]]


def numbers_of(plan: Plan, stores: Sequence[Storage]) -> Numbers:
    """Return the state of each parameter as rules see it, as local pieces."""
    found: Numbers = {}
    for bucket, store in zip(plan.buckets, stores, strict=True):
        wide = torch.promote_types(bucket.entries[0].dtype, torch.float32)
        eight = dict(encoded(dict(bucket.entries[0].slots)))
        whole = {name: torch.zeros_like(store.stacked[name], dtype=wide) for name in eight}
        for update in bucket.updates if eight else ():
            slots = dict(update.slots)
            numbers = opened(store.batches(0, len(bucket.entries), update), slots, update.part, wide)
            for name, x in whole.items():
                update.part.write_back(x, numbers[name], slots[name].dims or BOTH)
        parts = {name: x.split(bucket.local_batches) for name, x in whole.items()}
        for number, (entry, local) in enumerate(zip(bucket.entries, store.locals, strict=True)):
            shapes = {name: entry.state_layout(slot).local for name, slot in entry.local_slots if name in eight}
            own = {name: parts[name][number].view(shape) for name, shape in shapes.items()}
            found[entry.name] = {**local, **own}
    return found


def make_room(plan: Plan, groups: Groups, state: Any, numbers: Numbers) -> None:
    """Replace the state of each matrix parameter by what a new ``plan`` keeps: ``numbers``, or zeros for 8 bits."""
    for entry, parameter in zip(plan.entries, plan.parameters(groups), strict=True):
        if not entry.view or not entry.is_owner:
            continue
        old = numbers[entry.name]
        others = {key: value for key, value in state[parameter].items() if key not in old and key not in _names(entry)}
        kept = {}
        for name, slot in entry.local_slots:
            layout = entry.state_layout(slot)
            eight = slot.dtype == torch.int8 or name.endswith(SCALES)
            local = torch.zeros(layout.local, dtype=slot.dtype, device=entry.state_device) if eight else old[name]
            kept[name] = layout.wrap(local)
        state[parameter] = {**others, **kept}


def encode_state(plan: Plan, stores: Sequence[Storage], numbers: Numbers, comm: Comm) -> None:
    """Encode ``numbers`` into the state that is kept in 8 bits. All ranks must call this together."""
    for bucket, store in zip(plan.buckets, stores, strict=True):
        first, count = bucket.entries[0], len(bucket.entries)
        wide = torch.promote_types(first.dtype, torch.float32)
        own = [(entry, numbers[entry.name]) for entry in bucket.entries if entry.is_owner]
        together: dict[str, Tensor] = {}
        for name, slot in encoded(dict(first.slots)):
            none = torch.empty(0, *first.state_layout(slot).local[first.batch_dims :], dtype=wide, device=first.device)
            pieces = [entry.stack(state[name]).to(first.device, wide) for entry, state in own]
            together[name] = torch.cat([none, *pieces])
        for update in bucket.updates if together else ():
            slots, held = dict(update.slots), store.batches(0, count, update)
            state = {name: x.to(first.device) for name, x in held.items()}
            shares = bucket.shares(update)
            transport = Transport(update.part, comm, CallBatcher(), update.first_owner, update.replicas, shares)
            taken = {name: update.part.view_of(x, slots[name].dims or BOTH).clone() for name, x in together.items()}
            finish(close(state, slots, taken, transport))
            for name, x in state.items():
                held[name].copy_(x)
            store.put_back(0, count, update, held)


def _names(entry: Entry) -> set[str]:
    names = {name for name, _ in entry.slots}
    return names | {name + SCALES for name in names}
