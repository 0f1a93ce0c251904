"""Sharding a model over the ranks of a run, by torch's own means.

    tp      parallelize_module: q, k, v, gate and up are cut by output features, o and down by input features, so one
            all-reduce follows the attention and one the feed-forward part. Embeddings, norms and head are whole on
            every rank of tp, and have the same values there.
    fsdp    fully_shard over each layer and over the rest; with dp > 1 on the mesh (dp, fsdp): replicas of shards
    dp      without the others: DistributedDataParallel

The optimizer reads all this from the placements. It is given a process group only for dp without the others. If it
averages over dp itself (--replica-sync), torch is not told about dp, and the optimizer is given dp's process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.ranks import Ranks

COLUMNWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Spread:
    """A sharded model: training calls ``forward``; the optimizer needs ``group``, the replicas of plain parameters."""

    forward: nn.Module
    group: dist.ProcessGroup | None = None

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch. Replicas average gradients only after the last one."""
        ddp = self.forward
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not last else nullcontext()


def spread(model: nn.Module, ranks: Ranks, own_gradients: bool = False) -> Spread:
    """Shard ``model`` in place. Raises ``UserError`` if it cannot be sharded so.

    ``own_gradients``: each replica of dp keeps its own gradients, and the optimizer averages.
    """
    if ranks.mesh is None:
        return Spread(model)
    if ranks.tp > 1:
        _tensor_parallel(model, ranks)
    if own_gradients and ranks.dp > 1:
        if ranks.fsdp > 1:
            _fully_shard(model, ranks.mesh["fsdp"])
        return Spread(model, ranks.mesh["dp"].get_group())
    if ranks.fsdp > 1 or (ranks.dp > 1 and ranks.tp > 1):
        mesh = ranks.mesh["dp", "fsdp"] if ranks.dp > 1 else ranks.mesh["fsdp"]
        _fully_shard(model, mesh)
    elif ranks.dp > 1:
        group = ranks.mesh["dp"].get_group()
        ddp = DistributedDataParallel(model, process_group=group)
        _warm(ddp)
        return Spread(ddp, group)
    return Spread(model)


def _fully_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _warm(ddp: DistributedDataParallel) -> None:
    """Run one backward pass and discard its gradients, so that a resumed run is bit for bit the uninterrupted one.

    DDP reorders its buckets after its first backward pass; sums over more than two ranks are then rounded differently.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(ddp.parameters()).device)
    ddp(input_ids=tokens, use_cache=False).logits.sum().backward()
    ddp.zero_grad()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost `ModuleList`s."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _tensor_parallel(model: nn.Module, ranks: Ranks) -> None:
    assert ranks.mesh is not None
    config = cast("Any", model).config.get_text_config()
    layers = list(_layers(model))
    expected = {*COLUMNWISE, *ROWWISE}
    for layer in layers:
        # A parameter that each rank applies to its own heads, such as a norm per head, would need a sum of gradients.
        inside = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
        if {name for name in inside if name.startswith(("self_attn.", "mlp."))} != expected or not layers:
            raise UserError(
                f"--tp supports models with the layers of Llama ({', '.join(sorted(expected))}), and "
                f"{type(model).__name__} has others; use --fsdp {ranks.fsdp * ranks.tp} --tp 1."
            )
    counts = {
        "attention heads": int(config.num_attention_heads),
        "key-value heads": int(config.num_key_value_heads),
        "feed-forward features": int(config.intermediate_size),
    }
    for what, count in counts.items():
        if count % ranks.tp:
            raise UserError(f"--tp {ranks.tp} does not divide the model's {count} {what}; give a --tp that does.")
    styles = {name: ColwiseParallel() for name in COLUMNWISE} | {name: RowwiseParallel() for name in ROWWISE}
    for layer in layers:
        parallelize_module(layer, ranks.mesh["tp"], cast("Any", styles))
