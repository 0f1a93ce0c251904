"""Saving pieces of tensors in safetensors files by `torch.distributed.checkpoint`, to load them in any other sharding.

A piece is the range [offset, offset + length) of each dimension that a rank holds. `orthoshard.layout` reads it from
the placements. A piece may be a CPU copy of a tensor that is sharded over GPUs. Every rank offers all its pieces; if
several ranks hold the same piece, torch's planner lets one of them write it.

torch's own pieces of DTensors do not work: for `_StridedShard` with uneven parts, such as 50,257 rows over
fsdp 4 x tp 2, `compute_local_shape_and_global_offset` (torch 2.13) returns another cut than `fully_shard` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType

from orthoshard.layout import local_of, read_layout


@dataclass(frozen=True)
class Piece:
    """The part ``local`` of a whole tensor of ``shape`` that begins at ``offset``.

    torch's planners call the two methods to get the chunks of a type that they do not know.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(self.offset), self.local.shape)] if self.local.numel() else []

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties, shape = TensorProperties(dtype=self.local.dtype), torch.Size(self.shape)
        return [
            WriteItem(MetadataIndex(name, c.offsets), WriteItemType.SHARD, None, TensorWriteData(c, properties, shape))
            for c in self.__create_chunk_list__()
        ]


def piece_of(name: str, tensor: Tensor, copy: bool = False) -> Piece:
    """Return the local piece of ``tensor``, sharing its memory, or, with ``copy``, as a CPU copy."""
    layout, local = read_layout(name, tensor), local_of(tensor).detach()
    assert tuple(local.shape) == layout.local, f"{name}: {tuple(local.shape)} is not {layout.local}"
    local = local.to("cpu", copy=True) if copy else local
    return Piece(local, layout.shape, tuple(offset for offset, _ in layout.local_slices))


def save_pieces(folder: Path, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None) -> None:
    """Write one safetensors file per rank of ``group`` into ``folder``; without a group, one of this process alone."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(pieces), storage_writer=writer, planner=_Save(), process_group=group, no_dist=group is None)


def load_pieces(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fill the pieces from the files of any sharding. Every rank reads what it needs, without the others."""
    dcp.load(dict(pieces), storage_reader=HuggingFaceStorageReader(str(folder)), planner=_Load(), no_dist=True)


def saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return a description of the tensors in ``folder``, from the headers of its files."""
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return cast("dict[str, TensorStorageMetadata]", saved)


class _Save(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class _Load(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata  # torch's method would fill copies of pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local
