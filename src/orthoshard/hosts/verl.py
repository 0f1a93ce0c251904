"""Optimizers for verl, chosen in its configuration:

    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.optimizer_impl=orthoshard.hosts.verl
    actor_rollout_ref.actor.optim.optimizer=Dion
    +actor_rollout_ref.actor.optim.override_optimizer_config.rank_fraction=0.25

verl (0.9) calls ``Dion(module.parameters(), lr=..., weight_decay=..., rank_fraction=...)``. Without names, an embedding
cannot be told from a matrix, but the iterator that `module.parameters` returns still holds its module. Needs no host;
may import the public names of the package.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

import orthoshard
from orthoshard import RuleOptimizer


def module_of(parameters: Iterable[Any]) -> nn.Module:
    """Return the module of an iterator ``module.parameters()`` that has not been read yet. Raises ValueError for any
    other iterable."""
    if inspect.isgenerator(parameters) and inspect.getgeneratorstate(parameters) == inspect.GEN_CREATED:
        module = inspect.getgeneratorlocals(parameters).get("self")
        if isinstance(module, nn.Module):
            return module
    raise ValueError(
        f"orthoshard.hosts.verl takes module.parameters() as verl's FSDP engine gives it, and got a "
        f"{type(parameters).__name__}: which parameters are embeddings or output heads cannot be told from it. Build "
        f"the optimizer from the module instead: orthoshard.Dion(module)"
    )


def build(optimizer: type[RuleOptimizer], parameters: Iterable[Any], **options: Any) -> RuleOptimizer:
    """Return an optimizer of the module whose ``parameters()`` these are."""
    return optimizer(module_of(parameters), **options)


Dion = partial(build, orthoshard.Dion)
Dion3 = partial(build, orthoshard.Dion3)
DionTail = partial(build, orthoshard.DionTail)
LoRAMuon = partial(build, orthoshard.LoRAMuon)
Muon = partial(build, orthoshard.Muon)
NorMuon = partial(build, orthoshard.NorMuon)
RowNorm = partial(build, orthoshard.RowNorm)
