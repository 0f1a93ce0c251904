"""State tensors: one allocation a slot and bucket, of which each parameter's state is a view.

A step then works on whole batches and copies nothing, while `optimizer.state[p]` holds ordinary tensors that torch
can save, load and deep-copy. May import torch, `rules` and `plan`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Bucket
from ..rules import Slot

State = MutableMapping[Tensor, dict[str, Any]]


class Storage:
    """The state of one bucket, bound to `optimizer.state`."""

    def __init__(self, bucket: Bucket, parameters: Sequence[Tensor], seed: int, state: State) -> None:
        """Allocate. Take over what ``state`` already holds for these parameters (a checkpoint's), fill the rest."""
        self.bucket = bucket
        self.stacked: dict[str, Tensor] = {}
        self.views = _stacked_views(bucket, self.stacked) if bucket.shape else _single_tensors(bucket)
        for view, entry, parameter in zip(self.views, bucket.entries, parameters, strict=True):
            old = state.get(parameter) or {}
            for name, slot in entry.slots:
                if name in old:
                    view[name].copy_(torch.as_tensor(old[name]))
                else:
                    _fill(view[name], slot, parameter_seed(seed, entry.name))
            state[parameter] = dict(view)

    def bound(self, parameters: Sequence[Tensor], state: State) -> bool:
        """Whether ``state`` still holds our very tensors: nobody has loaded, cleared or replaced them."""
        return all(
            parameter in state and all(state[parameter].get(name) is tensor for name, tensor in view.items())
            for view, parameter in zip(self.views, parameters, strict=True)
        )

    def slots(self, first: int, last: int) -> dict[str, Any]:
        """The state of entries first..last-1 as a rule wants it: (b, ...) tensors, or lists for elementwise rules."""
        if not self.bucket.shape:
            return {name: [view[name] for view in self.views[first:last]] for name in self.views[0]}
        counts = [entry.batch for entry in self.bucket.entries]
        start, stop = sum(counts[:first]), sum(counts[:last])
        return {name: tensor[start:stop] for name, tensor in self.stacked.items()}


def _stacked_views(bucket: Bucket, stacked: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    views: list[dict[str, Tensor]] = [{} for _ in bucket.entries]
    counts = [entry.batch for entry in bucket.entries]
    first = bucket.entries[0]
    for name, slot in first.slots:
        shape = (sum(counts), *first.matrix_shape(slot))
        stacked[name] = torch.zeros(shape, dtype=slot.dtype, device=first.device)
        for view, entry, part in zip(views, bucket.entries, stacked[name].split(counts), strict=True):
            view[name] = part.view(entry.state_shape(slot))
    return views


def _single_tensors(bucket: Bucket) -> list[dict[str, Tensor]]:
    return [
        {name: torch.zeros(e.state_shape(slot), dtype=slot.dtype, device=e.device) for name, slot in e.slots}
        for e in bucket.entries
    ]


def parameter_seed(seed: int, name: str) -> int:
    """A seed of the parameter's own, equal on every rank, layout and device."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _fill(view: Tensor, slot: Slot, seed: int) -> None:
    """Initial values. Dion's Q is i.i.d. normal; we scale it by 1/sqrt(q), which changes no update (only its column
    space is used) and gives its columns about the unit length that they have from the first step on."""
    if slot.fill == "zeros":
        view.zero_()
        return
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(view.shape, generator=generator, dtype=torch.float32)
    view.copy_(normal.div_(math.sqrt(view.shape[-2])))
