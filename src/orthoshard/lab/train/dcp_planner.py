"""Pieces of whole tensors in safetensors files, by `torch.distributed.checkpoint`, to be read back in any other cut.

A piece is a rank's stretch [offset, offset + length) of each dimension, as `orthoshard.layout` reads it from the
placements, and lives wherever its memory is: a copy on the CPU of what is cut over GPUs is one like any other. Every
rank offers all its pieces, and torch's planner lets one rank write what several hold.

torch's own pieces of DTensors would not do: `compute_local_shape_and_global_offset` (torch 2.13) knows another cut of
`_StridedShard` than `fully_shard` makes where the parts are uneven, such as 50,257 rows over fsdp 4 x tp 2.
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
    """``local`` is the stretch that begins at ``offset`` of a whole tensor of ``shape``. The methods are those by which
    torch's planners ask what a tensor of a foreign kind consists of."""

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
    """The local piece of a tensor, sharing its memory, or a copy on the CPU."""
    layout, local = read_layout(name, tensor), local_of(tensor).detach()
    assert tuple(local.shape) == layout.local, f"{name}: {tuple(local.shape)} is not {layout.local}"
    local = local.to("cpu", copy=True) if copy else local
    return Piece(local, layout.shape, tuple(offset for offset, _ in layout.local_slices))


def save_pieces(folder: Path, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None) -> None:
    """Every rank of ``group`` writes one safetensors file into ``folder``; without a group this process alone does."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(pieces), storage_writer=writer, planner=_Save(), process_group=group, no_dist=group is None)


def load_pieces(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fill the pieces with what was saved, cut in whichever way. Every rank reads what it needs, for itself."""
    dcp.load(dict(pieces), storage_reader=HuggingFaceStorageReader(str(folder)), planner=_Load(), no_dist=True)


def saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What a folder holds, from the headers of its files."""
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return cast("dict[str, TensorStorageMetadata]", saved)


class _Save(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class _Load(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata  # torch's own would fill copies of what it does not know

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local
