"""State tensors: one allocation a slot and bucket, of which each parameter's state is a view.

A step then works on whole batches and copies nothing, while `optimizer.state[p]` holds ordinary tensors (DTensors
where the parameter is one) that torch can save, load and deep-copy. Where a view makes several matrices of a parameter,
each is a strided view of the same allocation.
May import torch, `plan` and `parts`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parts import BOTH, Dims
from ..plan import Bucket, Entry, Work

State = MutableMapping[Tensor, dict[str, Any]]


class Storage:
    """The state of one bucket, bound to `optimizer.state`."""

    def __init__(self, bucket: Bucket, parameters: Sequence[Tensor], seed: int, state: State) -> None:
        """Allocate. Take over what ``state`` already holds for these parameters (a checkpoint's), fill the rest."""
        self.bucket = bucket
        self.layouts = [{name: entry.state_layout(slot) for name, slot in entry.kept} for entry in bucket.entries]
        self.stacked: dict[str, Tensor] = {}
        self.locals: list[dict[str, Tensor]] = [{} for _ in bucket.entries]
        for name, _ in bucket.entries[0].slots:
            if bucket.works:
                self._stack(name)
            else:
                self._single(name)
        self.held: list[dict[str, Tensor]] = []
        for number, (entry, parameter) in enumerate(zip(bucket.entries, parameters, strict=True)):
            local, layouts, old = self.locals[number], self.layouts[number], state.get(parameter) or {}
            for name, slot in entry.kept:
                if name in old:
                    local[name].copy_(layouts[name].local_piece(torch.as_tensor(old[name])))
                elif slot.fill == "normal":
                    self._draw(number, name, parameter_seed(seed, entry.name))
            self.held.append({name: layouts[name].wrap(tensor) for name, tensor in local.items()})
            others = {key: value for key, value in old.items() if key not in dict(entry.slots)}  # a wrapper's
            state[parameter] = {**others, **self.held[-1]}

    def bound(self, parameters: Sequence[Tensor], state: State) -> bool:
        """Whether ``state`` still holds our very tensors: nobody has loaded, cleared or replaced them."""
        return all(
            parameter in state
            and (entry.here or not state[parameter])
            and all(state[parameter].get(name) is tensor for name, tensor in held.items())
            for entry, held, parameter in zip(self.bucket.entries, self.held, parameters, strict=True)
        )

    def lists(self, first: int, last: int) -> dict[str, list[Tensor]]:
        """The state of entries first..last-1, as elementwise rules want it."""
        return {name: [local[name] for local in self.locals[first:last]] for name in self.locals[0]}

    def batches(self, first: int, last: int, work: Work) -> dict[str, Tensor]:
        """The state of one work's matrices in entries first..last-1, as (b, ...) tensors; copies where `put_back` is
        needed."""
        return {name: work.part.take(x, dims) for name, x, dims in self._stretch(first, last, work)}

    def put_back(self, first: int, last: int, work: Work, batches: dict[str, Tensor]) -> None:
        """What was made of `batches`, where these are copies."""
        for name, x, dims in self._stretch(first, last, work):
            if work.part.copies(dims):
                work.part.give(x, batches[name], dims)

    def _stretch(self, first: int, last: int, work: Work) -> Iterator[tuple[str, Tensor, Dims]]:
        counts = self._counts()
        start, stop = sum(counts[:first]), sum(counts[:last])
        for name, slot in work.slots:
            yield name, self.stacked[name][start:stop], BOTH if slot.dims is None else slot.dims

    def _stack(self, name: str) -> None:
        first, counts = self.bucket.entries[0], self._counts()
        one = first.state_layout(dict(first.slots)[name]).local[first.ahead :]
        self.stacked[name] = self._zeros((sum(counts), *one), first, name)
        for local, layouts, part in zip(self.locals, self.layouts, self.stacked[name].split(counts), strict=True):
            if name in layouts:
                local[name] = part.view(layouts[name].local)

    def _counts(self) -> list[int]:
        """Of how many experts of each entry the state is here."""
        return [entry.batch * entry.here for entry in self.bucket.entries]

    def _single(self, name: str) -> None:
        for local, layouts, entry in zip(self.locals, self.layouts, self.bucket.entries, strict=True):
            local[name] = self._zeros(layouts[name].local, entry, name)

    def _zeros(self, shape: tuple[int, ...], entry: Entry, name: str) -> Tensor:
        return torch.zeros(shape, dtype=dict(entry.slots)[name].dtype, device=entry.device)

    def _draw(self, number: int, name: str, seed: int) -> None:
        """Initial values. Dion's Q is i.i.d. normal; we scale it by 1/sqrt(q), which changes no update (only its column
        space is used) and gives its columns about the unit length that they have from the first step on. The whole Q
        is drawn and cut, so that it does not depend on the cut; what no matrix uses of it stays zero."""
        layout = self.layouts[number][name]
        generator = torch.Generator("cpu").manual_seed(seed)
        normal = layout.piece(torch.randn(layout.shape, generator=generator, dtype=torch.float32)).contiguous()
        for work in self.bucket.works:
            for drawn, x, dims in self._stretch(number, number + 1, work):
                if drawn == name:
                    side = dims[-2]
                    q = side if isinstance(side, int) else work.part.side(side).length
                    values = work.part.take(normal.view(x.shape), dims) / math.sqrt(q)
                    work.part.give(x, values.to(x.device), dims)


def parameter_seed(seed: int, name: str) -> int:
    """A seed of the parameter's own, equal on every rank, layout and device."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
