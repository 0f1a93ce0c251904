"""State tensors: one allocation a slot and bucket, of which each parameter's state is a view.

A step then works on whole batches and copies nothing, while `optimizer.state[p]` holds ordinary tensors (DTensors
where the parameter is one) that torch can save, load and deep-copy. May import torch, `rules`, `plan` and `layout`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..plan import Bucket, Entry
from ..rules import Slot

State = MutableMapping[Tensor, dict[str, Any]]


class Storage:
    """The state of one bucket, bound to `optimizer.state`."""

    def __init__(self, bucket: Bucket, parameters: Sequence[Tensor], seed: int, state: State) -> None:
        """Allocate. Take over what ``state`` already holds for these parameters (a checkpoint's), fill the rest."""
        self.bucket = bucket
        self.layouts = [{name: entry.state_layout(slot) for name, slot in entry.slots} for entry in bucket.entries]
        self.stacked: dict[str, Tensor] = {}
        self.locals: list[dict[str, Tensor]] = [{} for _ in bucket.entries]
        for name, _ in bucket.entries[0].slots:
            if bucket.shape:
                self._stack(name)
            else:
                self._single(name)
        self.held: list[dict[str, Tensor]] = []
        for local, layouts, entry, parameter in zip(self.locals, self.layouts, bucket.entries, parameters, strict=True):
            old = state.get(parameter) or {}
            for name, slot in entry.slots:
                if name in old:
                    local[name].copy_(layouts[name].local_piece(torch.as_tensor(old[name])))
                else:
                    _fill(local[name], slot, layouts[name], parameter_seed(seed, entry.name))
            self.held.append({name: layouts[name].wrap(tensor) for name, tensor in local.items()})
            state[parameter] = dict(self.held[-1])

    def bound(self, parameters: Sequence[Tensor], state: State) -> bool:
        """Whether ``state`` still holds our very tensors: nobody has loaded, cleared or replaced them."""
        return all(
            parameter in state and all(state[parameter].get(name) is tensor for name, tensor in held.items())
            for held, parameter in zip(self.held, parameters, strict=True)
        )

    def slots(self, first: int, last: int) -> dict[str, Any]:
        """The state of entries first..last-1 as a rule wants it: (b, ...) tensors, or lists for elementwise rules."""
        if not self.bucket.shape:
            return {name: [local[name] for local in self.locals[first:last]] for name in self.locals[0]}
        counts = [entry.layout.batch for entry in self.bucket.entries]
        start, stop = sum(counts[:first]), sum(counts[:last])
        return {name: tensor[start:stop] for name, tensor in self.stacked.items()}

    def _stack(self, name: str) -> None:
        entries = self.bucket.entries
        counts = [entry.layout.batch for entry in entries]
        matrix = self.layouts[0][name].local[-2:]
        self.stacked[name] = self._zeros((sum(counts), *matrix), entries[0], name)
        for local, layouts, part in zip(self.locals, self.layouts, self.stacked[name].split(counts), strict=True):
            local[name] = part.view(layouts[name].local)

    def _single(self, name: str) -> None:
        for local, layouts, entry in zip(self.locals, self.layouts, self.bucket.entries, strict=True):
            local[name] = self._zeros(layouts[name].local, entry, name)

    def _zeros(self, shape: tuple[int, ...], entry: Entry, name: str) -> Tensor:
        return torch.zeros(shape, dtype=dict(entry.slots)[name].dtype, device=entry.device)


def parameter_seed(seed: int, name: str) -> int:
    """A seed of the parameter's own, equal on every rank, layout and device."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _fill(local: Tensor, slot: Slot, layout: Layout, seed: int) -> None:
    """Initial values. Dion's Q is i.i.d. normal; we scale it by 1/sqrt(q), which changes no update (only its column
    space is used) and gives its columns about the unit length that they have from the first step on. The whole Q is
    drawn and cut, so that it does not depend on the cut."""
    if slot.fill == "zeros":
        return
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(layout.shape, generator=generator, dtype=torch.float32)
    local.copy_(layout.piece(normal) / math.sqrt(layout.shape[-2]))
