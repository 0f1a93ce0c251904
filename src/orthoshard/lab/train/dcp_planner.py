"""Local pieces of tensors as plans of `torch.distributed.checkpoint`: what was saved in one cut loads in any other.

A piece is what one rank holds of a tensor: one stretch [offset, offset + length) of each dimension, which is what
`orthoshard.layout` reads from the placements, `_StridedShard` included. Every rank offers all its pieces, and torch's
planner lets one rank write what several hold. Pieces live wherever their memory is: a copy on the CPU of what is cut
over GPUs is a piece like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from orthoshard.layout import local_of, read_layout


@dataclass(frozen=True)
class Piece:
    """``local`` is the stretch that begins at ``offset`` of a whole tensor of ``shape``."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), self.local.shape)


def piece_of(name: str, tensor: Tensor, copy: bool = False) -> Piece:
    """The local piece of a tensor, sharing its memory, or a copy on the CPU."""
    layout, local = read_layout(name, tensor), local_of(tensor).detach()
    assert tuple(local.shape) == layout.local, f"{name}: {tuple(local.shape)} is not {layout.local}"
    local = local.to("cpu", copy=True) if copy else local
    return Piece(local, layout.shape, tuple(offset for offset, _ in layout.local_slices))


def save_pieces(folder: Path, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None) -> None:
    """Every rank of ``group`` writes one safetensors file into ``folder``; without a group this process alone does."""
    dcp.save(
        _tensors(pieces),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        planner=_Save(pieces),
        process_group=group,
        no_dist=group is None,
    )


def load_pieces(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fill the pieces with what was saved, cut in whichever way. Every rank reads what it needs, for itself."""
    dcp.load(
        _tensors(pieces),
        storage_reader=HuggingFaceStorageReader(str(folder)),
        planner=_Load(pieces),
        no_dist=True,
    )


def saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What a folder holds, from the headers of its files."""
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: facts for name, facts in saved.items() if isinstance(facts, TensorStorageMetadata)}


def _tensors(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    return {name: piece.local for name, piece in pieces.items()}


class _Save(DefaultSavePlanner):
    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, piece) for name, piece in self.pieces.items() if piece.local.numel()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index.fqn].local


def _item(name: str, piece: Piece) -> WriteItem:
    properties = TensorProperties(dtype=piece.local.dtype)
    return WriteItem(
        index=MetadataIndex(name, piece.chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(piece.chunk, properties, torch.Size(piece.shape)),
    )


class _Load(DefaultLoadPlanner):
    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for name, piece in self.pieces.items():
            facts = saved[name]
            assert isinstance(facts, TensorStorageMetadata)
            if piece.local.numel():
                items += create_read_items_for_chunk_list(name, facts, [piece.chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        local = self.pieces[read_item.dest_index.fqn].local
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            local = local.narrow(dim, offset, length)
        return local
