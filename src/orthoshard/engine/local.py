"""What surrounds forward and backward passes after which every replica keeps its own gradients. May import torch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def local_gradients(model: nn.Module) -> Generator[None]:
    """Let every replica keep its own gradients of the forward and backward passes inside this context.

    This is for ``replica_sync="factors"`` or ``"gradients"``: DistributedDataParallel does not average gradients here.
    Forward passes belong inside, too.

    Raises ValueError for a model whose `fully_shard` has a mesh with replicas: it averages over them itself.
    """
    module = model.get_submodule("_orig_mod") if "_orig_mod" in model._modules else model
    for part in module.modules():
        if isinstance(part, FSDPModule):
            _refuse_replicas(part)
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def _refuse_replicas(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if not isinstance(parameter, DTensor):
            continue
        for axis, placement in enumerate(parameter.placements):
            names = parameter.device_mesh.mesh_dim_names
            if isinstance(placement, Replicate) and parameter.device_mesh.size(axis) > 1 and axis == 0:
                raise ValueError(
                    f"parameter {name!r} is replicated over mesh axis {names[axis] if names else axis!r} of the mesh "
                    f"that fully_shard was given, so that its gradient is averaged over it in the backward pass: give "
                    f"fully_shard the shard mesh alone, such as mesh['shard'], and the optimizer "
                    f"process_group=mesh['replicas']"
                )
