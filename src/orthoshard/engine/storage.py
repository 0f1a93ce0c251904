"""State tensors: one allocation for each slot of a bucket, of which each parameter's state is a window.

A step works on whole batches and copies nothing, while `optimizer.state[p]` holds ordinary tensors (DTensors if the
parameter is one) that torch can save, load, copy and move. Each has a storage of its own that begins and ends where the
tensor does, so a copy of it in memory or in a file has the tensor's size, not the bucket's. If a view makes several
matrices of a parameter, each is a strided view of the same allocation.

`optimizer.state` alone keeps the memory alive. Hosts move state away to make room (``v.data = v.data.cpu()``,
``state[p][k] = v.cpu()``, ``v._local_tensor = ...``); if we held the memory, they would gain none. So `Memory` knows
where state lies without holding it, and each step checks whether it still lies there; `Storage` holds it for that step.
May import torch, `linalg`, `slots`, `layout`, `plan` and `parts`.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout, local_of
from ..linalg.eight_bits import encode_, largest_of_blocks, scales
from ..linalg.initial import normal_piece
from ..parts import BOTH, Dims
from ..plan import Bucket, BucketUpdate, Entry
from ..slots import SCALES

State = MutableMapping[Tensor, dict[str, Any]]
# A weak reference to a storage lives as long as the memory does. One to a tensor would not, and
# torch.utils.swap_tensors refuses tensors with weak references.
Alive = weakref.ref[torch.UntypedStorage]


@dataclass(frozen=True)
class Storage:
    """The state of one bucket, for one step.

    locals   for each entry, its state by slot: local pieces, in the memory of what `optimizer.state` holds
    stacked  if the bucket has matrices, each slot of all entries as one tensor
    """

    bucket: Bucket
    locals: Sequence[dict[str, Tensor]]
    stacked: dict[str, Tensor]

    def host_tensors(self, first: int, last: int) -> list[Tensor]:
        """Return what must be copied to the device for entries first..last-1: the whole bucket, if it has matrices."""
        if self.bucket.updates:
            return list(self.stacked.values())
        return [x for local in self.locals[first:last] for x in local.values()]

    def on_device(self, first: int, last: int, copies: Sequence[Tensor]) -> Storage:
        """Return the same state with ``copies`` in place of what `host_tensors` returned."""
        if self.bucket.updates:
            return replace(self, stacked=dict(zip(self.stacked, copies, strict=True)))
        each = iter(copies)
        own = [{name: next(each) for name in local} for local in self.locals[first:last]]
        return replace(self, locals=[*self.locals[:first], *own])

    def lists(self, first: int, last: int) -> dict[str, list[Tensor]]:
        """Return the state of entries first..last-1 as lists, the form that elementwise rules take."""
        return {name: [local[name] for local in self.locals[first:last]] for name in self.locals[0]}

    def batches(self, first: int, last: int, update: BucketUpdate) -> dict[str, Tensor]:
        """Return the state of one update's matrices in entries first..last-1, as (b, ...) tensors. They are
        copies if `put_back` is needed."""
        return {name: update.part.view_of(x, dims) for name, x, dims in self._stretch(first, last, update)}

    def put_back(self, first: int, last: int, update: BucketUpdate, batches: dict[str, Tensor]) -> None:
        """Write `batches` back after an update, if they are copies."""
        for name, x, dims in self._stretch(first, last, update):
            if update.part.needs_copy(dims):
                update.part.write_back(x, batches[name], dims)

    def draw(self, number: int, name: str, layout: Layout, seed: int) -> None:
        """Draw the initial values of an entry's slot. Dion's Q is i.i.d. normal. We scale it by 1/sqrt(q), which
        changes no update (only its column space is used) and gives its columns about the unit length that they have
        after the first step. Entries that no matrix uses stay zero."""
        normal = normal_piece(layout.shape, layout.local_slices, seed)
        for update in self.bucket.updates:
            for drawn, x, dims in self._stretch(number, number + 1, update):
                if drawn == name:
                    side = dims[-2]
                    q = side if isinstance(side, int) else update.part.side(side).length
                    values = update.part.view_of(normal.view(x.shape), dims) / math.sqrt(q)
                    if x.dtype == torch.int8:
                        values = self._drawn_in_8_bits(number, name + SCALES, update, values)
                    update.part.write_back(x, values.to(x.device), dims)

    def _drawn_in_8_bits(self, number: int, scales_name: str, update: BucketUpdate, values: Tensor) -> Tensor:
        """Return initial values in 8 bits, and write their scales. The rows of Q are never cut,
        so each has its scales here."""
        scale = scales(largest_of_blocks(values, values.shape[-1], 0))
        for name, x, dims in self._stretch(number, number + 1, update):
            if name == scales_name:
                update.part.write_back(x, scale.to(x.device), dims)
        q = torch.empty_like(values, dtype=torch.int8)
        encode_(q, values, scale, 0)
        return q

    def _stretch(self, first: int, last: int, update: BucketUpdate) -> Iterator[tuple[str, Tensor, Dims]]:
        counts = self.bucket.local_batches
        start, stop = sum(counts[:first]), sum(counts[:last])
        for name, slot in update.slots:
            yield name, self.stacked[name][start:stop], BOTH if slot.dims is None else slot.dims


class Memory:
    """Where the state of one bucket lies, as long as `optimizer.state` keeps it there."""

    def __init__(self, bucket: Bucket, parameters: Sequence[Tensor], seed: int, state: State) -> None:
        """Allocate. Take over what ``state`` already holds for these parameters (from a
        checkpoint), and fill the rest."""
        self.bucket = bucket
        self._pieces: list[dict[str, tuple[Alive, int, torch.dtype, torch.Size]]] = []
        whole = Storage(bucket, [{} for _ in bucket.entries], _stacks(bucket))
        parts = {name: x.split(bucket.local_batches) for name, x in whole.stacked.items()}
        for number, (entry, parameter) in enumerate(zip(bucket.entries, parameters, strict=True)):
            old, local = state.get(parameter) or {}, whole.locals[number]
            layouts = {name: entry.state_layout(slot) for name, slot in entry.local_slots}
            for name, slot in entry.local_slots:
                layout = layouts[name]
                part = parts[name][number].view(layout.local) if parts else None
                local[name] = _zeros(layout.local, entry, name) if part is None else _window(part)
                if name in old:
                    local[name].copy_(layout.local_piece(torch.as_tensor(old[name])))
                elif slot.fill == "normal":
                    whole.draw(number, name, layout, parameter_seed(seed, entry.name))
            others = {key: value for key, value in old.items() if key not in dict(entry.slots)}  # state of a wrapper
            state[parameter] = {**others, **{name: layouts[name].wrap(piece) for name, piece in local.items()}}
            self._pieces.append({name: (_alive(x), x.data_ptr(), x.dtype, x.shape) for name, x in local.items()})
        self._stacked = {name: (_alive(x), x.shape, x.stride(), x.new_empty(0)) for name, x in whole.stacked.items()}

    def bind(self, parameters: Sequence[Tensor], state: State) -> Storage | None:
        """Return the state to work with; None if some of it was loaded, cleared, replaced or
        moved, and so lies elsewhere."""
        found: list[dict[str, Tensor]] = []
        for entry, pieces, parameter in zip(self.bucket.entries, self._pieces, parameters, strict=True):
            held = state.get(parameter)
            if held is None or (held and not entry.is_owner):
                return None
            local: dict[str, Tensor] = {}
            for name, (storage, address, dtype, shape) in pieces.items():
                tensor = held.get(name)
                if not isinstance(tensor, Tensor):
                    return None
                piece = local[name] = local_of(tensor)
                # Compare the address, too: Tensor.share_memory_ keeps the storage object and moves its memory.
                if piece.data_ptr() != address or piece.untyped_storage() is not storage():
                    return None
                if piece.dtype != dtype or piece.shape != shape:
                    return None
            found.append(local)
        stacked: dict[str, Tensor] = {}
        for name, (storage, shape, stride, empty) in self._stacked.items():
            memory = storage()
            # no memory means that no entry of the bucket is on this rank
            stacked[name] = empty.new_empty(shape) if memory is None else empty.detach().set_(memory, 0, shape, stride)
        return Storage(self.bucket, found, stacked)


def _alive(tensor: Tensor) -> Alive:
    return weakref.ref(tensor.untyped_storage())


def _stacks(bucket: Bucket) -> dict[str, Tensor]:
    """Allocate a zero tensor for each slot of a bucket of matrices: one allocation, one whole
    parameter after the other."""
    if not bucket.updates:
        return {}
    first, count = bucket.entries[0], sum(bucket.local_batches)
    shapes = {name: first.state_layout(slot).local[first.batch_dims :] for name, slot in first.slots}
    return {name: _zeros((count, *shape), first, name) for name, shape in shapes.items()}


def _zeros(shape: tuple[int, ...], entry: Entry, name: str) -> Tensor:
    pinned = entry.offload and entry.device.type == "cuda" and torch.cuda.is_available()
    return torch.zeros(shape, dtype=dict(entry.slots)[name].dtype, device=entry.state_device, pin_memory=pinned)


def _window(part: Tensor) -> Tensor:
    """Return the same memory as a tensor that is no view: its storage is this part of the whole
    one, which it keeps alive."""
    storage, start = part.untyped_storage(), part.storage_offset() * part.element_size()
    if storage.device.type == "meta":
        return part.data
    window = storage[start : start + part.numel() * part.element_size()]
    return part.new_empty(0).set_(window, 0, part.shape, part.stride())


def parameter_seed(seed: int, name: str) -> int:
    """Return the parameter's own seed, equal on every rank, layout and device."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
