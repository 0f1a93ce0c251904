"""What an optimizer may be given: a model, however it is wrapped, or groups whose members are sound.

Everything here is asked before anything is built. May import `rules`, `groups`, `params` and `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .groups import made_up, rule_class
from .layout import many_ranks
from .params import param_groups


def unwrapped(params: nn.Module | Iterable[Any]) -> tuple[nn.Module | Iterable[Any], Any]:
    """The model within DistributedDataParallel and torch.compile, and the process group of the former, if any."""
    process_group: Any = None
    while isinstance(params, nn.Module) and (isinstance(params, DistributedDataParallel) or _compiled(params)):
        if isinstance(params, DistributedDataParallel):
            process_group, params = process_group or params.process_group, params.module
        else:
            params = params.get_submodule("_orig_mod")
    return params, process_group


def grouped(params: nn.Module | Iterable[Any], given: dict[str, Any], scalars: dict[str, Any]) -> Iterable[Any]:
    """The groups of a model; what is no model has its groups already. ``given``: the optimizer's own keys;
    ``scalars``: what was said of no matrices."""
    if isinstance(params, nn.Module):
        scale = {"scale": given["scale"]} if "scale" in given else {}  # decides on the scalar rule's lr
        return param_groups(params, matrix=given["rule"], **scale, **scalars)
    if scalars:
        raise ValueError(
            f"{' and '.join(scalars)} choose the groups of a model, but here the groups are already made: "
            f"give these options to param_groups, or pass the model"
        )
    return params


def name_members(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Make up names where a group has none: torch wants them in all groups or in none, and bases start from them."""
    members = group["params"]
    if group.get("param_names") or any(isinstance(member, tuple) for member in members):
        return
    taken, number = {name for other in others for name in other["param_names"]}, len(others)
    while any(made_up(number, index) in taken for index in range(len(members))):
        number += 1
    group["param_names"] = [made_up(number, index) for index in range(len(members))]


def check_group(group: dict[str, Any], others: list[dict[str, Any]], process_group: Any) -> None:
    """Raises ValueError where a completed group cannot stand beside the ``others``, or lacks its replicas."""
    if group["replica_sync"] != "none" and process_group is None and many_ranks():
        raise ValueError(
            f"replica_sync={group['replica_sync']!r} averages over replicas; say which ranks these are by "
            f"process_group= (a group, or a mesh of one dimension such as mesh['replicas']), or pass the "
            f"DistributedDataParallel model itself"
        )
    _check_members(group, others)
    if _shards_plain(group) and process_group is None and many_ranks():
        raise ValueError(
            "shard_state='zero1' shares out state over replicas; say which ranks hold the same plain tensors by "
            "process_group=, or pass the DistributedDataParallel model itself"
        )


def refuse_one_for_many(groups: list[dict[str, Any]]) -> None:
    """Hosts may exchange parameters behind our back, but each for one."""
    for number, group in enumerate(groups):
        names, members = group.get("param_names", ()), group["params"]
        if len(names) > len(members) == 1 and members[0].ndim == 1:
            raise ValueError(
                f"one flat tensor has taken the place of the {len(names)} parameters of group {number}, as DeepSpeed "
                f"ZeRO does it; use PyTorch's fully_shard (FSDP2) instead, which keeps matrices"
            )


def _compiled(module: nn.Module) -> bool:
    """Whether this is what torch.compile returns for a module."""
    return "_orig_mod" in module._modules


def _shards_plain(group: dict[str, Any]) -> bool:
    """Whether replicas have to share out the state of matrices that are plain tensors."""
    members = [member[1] if isinstance(member, tuple) else member for member in group["params"]]
    plain = any(getattr(member, "placements", None) is None for member in members)
    return group["shard_state"] == "zero1" and rule_class(group).matrices and plain


def _check_members(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Members are parameters or (name, parameter) pairs; names tell initial bases apart, so each is given once."""
    members = group["params"]
    if not members:
        raise ValueError("a parameter group is empty; leave it out")
    if len({id(member[1] if isinstance(member, tuple) else member) for member in members}) < len(members):
        raise ValueError("a parameter is in the group twice; give each parameter once (tied weights are one parameter)")
    names = group.get("param_names") or [member[0] for member in members if isinstance(member, tuple)]
    if names and len(names) != len(members):
        raise ValueError(f"a group has {len(members)} parameters and {len(names)} names; name all of them or none")
    taken = {name for other in others for name in other.get("param_names", ())}
    for name in names:
        if name in taken:
            raise ValueError(f"two parameters are named {name!r}; give each a name of its own")
        taken.add(name)
