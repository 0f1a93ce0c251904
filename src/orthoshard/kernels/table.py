"""A list of blocks in the form that one launch takes: addresses of matrices, in a table on the device.

    blocks (e, m, n), ...   ->   groups of equal strides; each a table (k, 2) of (address, place in the batch)
    and tensors that go with them, of the same shapes:  their addresses behind these

Weights and gradients lie wherever their parameters lie. A kernel that gets their addresses in a table needs one
launch where a list of tensors would need one each. Tables are cached: addresses of weights never change, and those
of gradients come back, since torch's allocator hands out the same memory in the same order. So a settled step sends
no table. May import torch and `linalg`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linalg.host_sync import filled

ALIGNED = 16  # bytes: what one vector load or store of a GPU takes
KEPT = 1024  # lists in the cache: a few for each bucket of a model, each 16 bytes a matrix, and as much on the host

Entry = tuple[int, ...]


class Group(NamedTuple):
    """Matrices of equal strides and dtype, ``matrices`` of them. ``aligned``: whether they, and what goes with them,
    all begin where a vector may. ``beside``: the strides of what goes with them, one tensor after the other."""

    table: Tensor
    matrices: int
    strides: tuple[int, int]
    dtype: torch.dtype
    aligned: bool
    beside: tuple[int, ...]


class Kept(NamedTuple):
    """Groups whose tables are on a device, the stream that sent them, and the event of their arrival."""

    groups: list[Group]
    stream: torch.cuda.Stream
    sent: torch.cuda.Event


_kept: OrderedDict[tuple[Any, ...], Kept] = OrderedDict()
_captured: dict[tuple[Any, ...], Kept] = {}  # a graph holds their addresses and may be replayed at any time


def groups(blocks: Sequence[Tensor], *companions: Sequence[Tensor]) -> list[Group]:
    """Return the matrices of all blocks, grouped by strides and dtype; most often one group. ``companions``: lists of
    tensors as large as the blocks."""
    device = blocks[0].device
    if device.type != "cuda":
        return list(_grouped(blocks, *companions))
    # all that a table is made of, in as few calls per tensor as possible: a model has hundreds of tensors
    seen = [(x.data_ptr(), x.size(0), x.dtype, x.stride()) for tensors in (blocks, *companions) for x in tensors]
    key = (device, len(companions), *seen)
    stream, kept = torch.cuda.current_stream(device), _kept.get(key)
    capturing = torch.cuda.is_current_stream_capturing()
    if kept is not None:
        _kept.move_to_end(key)
        if capturing:  # capture begins with a wait for everything, so the tables have arrived
            _captured[key] = kept
        elif kept.stream != stream:
            stream.wait_event(kept.sent)
            for group in kept.groups:
                group.table.record_stream(stream)
        return kept.groups
    found = list(_grouped(blocks, *companions))
    if not capturing:  # tables made during capture are memory of the graph
        sent = torch.cuda.Event()
        sent.record(stream)
        _kept[key] = Kept(found, stream, sent)
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    return found


def _grouped(blocks: Sequence[Tensor], *companions: Sequence[Tensor]) -> Iterator[Group]:
    found: dict[tuple[torch.dtype, tuple[int, ...]], list[Entry]] = {}
    place = 0
    for together in zip(blocks, *companions, strict=True):
        strides = tuple(stride for x in together for stride in x.stride()[1:])
        entries = found.setdefault((together[0].dtype, strides), [])
        addresses = [x.data_ptr() for x in together]
        steps = [x.stride(0) * x.element_size() for x in together]
        for _ in range(together[0].shape[0]):
            entries.append((addresses[0], place, *addresses[1:]))
            addresses = [address + step for address, step in zip(addresses, steps, strict=True)]
            place += 1
    for (dtype, strides), entries in found.items():
        if entries:
            table = _table(blocks[0].device, entries)
            aligned = all(address % ALIGNED == 0 for entry in entries for address in (entry[0], *entry[2:]))
            yield Group(table, len(entries), (strides[0], strides[1]), dtype, aligned, strides[2:])


def _table(device: torch.device, entries: list[Entry]) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return filled([value for entry in entries for value in entry], device).view(len(entries), -1)
    host = torch.tensor(entries, dtype=torch.int64)
    # from pageable memory torch would wait for the copy
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
