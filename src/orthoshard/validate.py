"""Checks of what an optimizer is given: a model, perhaps wrapped, or groups of parameters.

May import `rules`, `groups`, `params` and `layout`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .groups import made_up, rule_class
from .layout import many_ranks
from .params import param_groups


def unwrapped(
    params: nn.Module | Iterable[Any],
) -> tuple[nn.Module | Iterable[Any], DistributedDataParallel | None]:
    """Return the model inside of DistributedDataParallel and torch.compile, and the DistributedDataParallel, if any."""
    replicated: DistributedDataParallel | None = None
    while isinstance(params, nn.Module) and (isinstance(params, DistributedDataParallel) or _compiled(params)):
        if isinstance(params, DistributedDataParallel):
            replicated, params = replicated or params, params.module
        else:
            params = params.get_submodule("_orig_mod")
    return params, replicated


def grouped(params: nn.Module | Iterable[Any], given: dict[str, Any], said: dict[str, Any]) -> Iterable[Any]:
    """Return the groups of a model; anything else has its groups already. ``given``: the optimizer's own keys;
    ``said``: arguments of `param_groups`."""
    if isinstance(params, nn.Module):
        return param_groups(params, matrix=given["rule"], **said)
    if said:
        raise ValueError(
            f"{' and '.join(said)} choose the groups of a model, but here the groups are already made: "
            f"give these options to param_groups, or pass the model"
        )
    return ordered(params)


def members_of(params: Any) -> list[Any]:
    """Return the members of a group as a list. Raises TypeError for a set."""
    return [params] if isinstance(params, Tensor) else list(ordered(params))


def ordered(params: Any) -> Any:
    """Return ``params``, but raise TypeError for a set, whose order differs between ranks and runs."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("parameters are given in a set, whose order differs between runs and ranks; give a list")
    return params


def name_members(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Make up names if a group has none: torch wants them in all groups or none, and initial bases depend on them."""
    members = group["params"]
    if group.get("param_names") or any(isinstance(member, tuple) for member in members):
        return
    taken, number = {name for other in others for name in other["param_names"]}, len(others)
    while any(made_up(number, index) in taken for index in range(len(members))):
        number += 1
    group["param_names"] = [made_up(number, index) for index in range(len(members))]


def check_replicas(group: dict[str, Any], process_group: Any) -> None:
    """Raise ValueError if a completed group needs to know its replicas and does not."""
    if group["replica_sync"] != "none" and process_group is None and many_ranks():
        raise ValueError(
            f"replica_sync={group['replica_sync']!r} averages over replicas; say which ranks these are by "
            f"process_group= (a group, or a mesh of one dimension such as mesh['replicas']), or pass the "
            f"DistributedDataParallel model itself"
        )
    if _shards_plain(group) and process_group is None and many_ranks():
        raise ValueError(
            "shard_state='zero1' divides state over replicas; say which ranks hold the same plain tensors by "
            "process_group=, or pass the DistributedDataParallel model itself"
        )


def refuse_flat(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError if one vector has replaced several parameters, or vectors have replaced matrices. A host may
    replace parameters one for one, by parameters of the same shape."""
    for number, group in enumerate(groups):
        names, members = group.get("param_names", ()), group["params"]
        flat = [member for member in members if member.ndim == 1]
        matrices = group.get("role") == "matrix" and rule_class(group).matrices
        if flat and (len(names) > len(members) == 1 or matrices):
            tensors = "one flat tensor has" if len(flat) == 1 else f"{len(flat)} flat tensors have"
            raise ValueError(
                f"{tensors} taken the place of the {len(names)} parameters of group {number}, as DeepSpeed ZeRO and "
                f"Megatron's distributed optimizer do; use PyTorch's fully_shard (FSDP2) instead, which keeps matrices"
            )


def refuse_placeholders(groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError for a parameter that was left behind on meta. (One with a gradient belongs to a dry run.)"""
    for number, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.device.type == "meta" and parameter.requires_grad and parameter.grad is None:
                names = group.get("param_names")
                raise RuntimeError(
                    f"parameter {names[index] if names else made_up(number, index)!r} is still on meta: the optimizer "
                    f"was built before the weights existed, and to_empty or load_state_dict(assign=True) has replaced "
                    f"the parameter since; build the optimizer after that"
                )


def refuse_strays(state: Iterable[Any], groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError for state of a parameter whose group was removed: a checkpoint has no place for it."""
    members = {id(parameter) for group in groups for parameter in group["params"]}
    for key in state:
        if isinstance(key, Tensor) and id(key) not in members:
            raise RuntimeError(
                f"there is state of a parameter {tuple(key.shape)} that is in no group any more, so it cannot be "
                f"saved: delete its entry of optimizer.state as well, or put its group back"
            )


def refuse_uneven_inputs(replicated: DistributedDataParallel | None) -> None:
    """Raise RuntimeError within `DistributedDataParallel.join`, in the first step, while all ranks still have inputs.
    A rank without inputs repeats the model's collectives, and would answer the optimizer's collectives with those."""
    config = getattr(replicated, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "replicas that share the work of a step must all take it, and within model.join() ranks without inputs "
            "take none: give every rank equally many batches, use join(throw_on_early_termination=True), or build the "
            "optimizer from model.module, without its replicas"
        )


def refuse_zero_redundancy() -> None:
    """Raise TypeError if ZeroRedundancyOptimizer builds the optimizer: it does so on every rank, each with other
    parameters. An error in the parameters of one rank would be raised there alone, and the other ranks would wait."""
    home = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame: FrameType | None = sys._getframe(1)
    while home is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), home.ZeroRedundancyOptimizer):
            raise TypeError(
                "ZeroRedundancyOptimizer gives each rank an optimizer of its own parameters, without their names and "
                "roles; build the optimizer from the DistributedDataParallel model itself with shard_state='zero1', "
                "which keeps the state of each matrix at one replica"
            )
        frame = frame.f_back


def _compiled(module: nn.Module) -> bool:
    """Return whether torch.compile made this module."""
    return "_orig_mod" in module._modules


def _shards_plain(group: dict[str, Any]) -> bool:
    """Return whether replicas have to divide the state of matrices that are plain tensors."""
    members = [member[1] if isinstance(member, tuple) else member for member in group["params"]]
    plain = any(getattr(member, "placements", None) is None for member in members)
    return group["shard_state"] == "zero1" and rule_class(group).matrices and plain


def check_members(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Check that a group has members, each given once, with names that differ: initial bases depend on the names.
    Members are parameters or (name, parameter) pairs."""
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
        if not isinstance(name, str):
            raise TypeError(f"a parameter is named {name!r}; a name is a str")
        if name in taken:
            raise ValueError(f"two parameters are named {name!r}; give each a name of its own")
        taken.add(name)
