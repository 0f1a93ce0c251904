"""Model and optimizer to and from a checkpoint: tensors by `torch.distributed.checkpoint`, everything else as JSON.

    shard-*.safetensors    model.<parameter>, optimizer.state.<parameter>.<name>, ...
    plain.json             {"step", "config", "data", "numbers": state that is no tensor, "groups": lr, momentum, ...}

No pickle anywhere. State is gathered under full parameter names (flattened optimizer state), so that the same files can
be read by another process count. `capture` and `write` are apart: a later writer may run beside the training.
torch's loader copies into what it is given and would silently convert: names, shapes and dtypes are compared first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from orthoshard.train import vault
from orthoshard.train.errors import UserError

PLAIN = "plain.json"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, still sharing memory with the model and the optimizer."""

    tensors: dict[str, torch.Tensor]
    plain: dict[str, Any]


def capture(model: nn.Module, optimizer: Optimizer, plain: dict[str, Any]) -> Snapshot:
    second = _second_names(model)
    tensors = {f"model.{name}": value for name, value in get_model_state_dict(model).items() if name not in second}
    numbers: dict[str, Any] = {}
    for name, value in get_optimizer_state_dict(model, optimizer, options=FLAT).items():
        if name.startswith("param_groups."):  # says the same for every parameter of a group
            continue
        if isinstance(value, torch.Tensor):
            tensors[f"optimizer.{name}"] = value
        else:
            numbers[name] = value
    groups = [
        {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return Snapshot(cast("dict[str, torch.Tensor]", tensors), plain | {"numbers": numbers, "groups": groups})


def write(parent: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    """A new folder ``parent/step-...``, whole or not at all."""

    def fill(folder: Path) -> None:
        with _one_process():
            dcp.save(
                cast("dict[str, Any]", snapshot.tensors),
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                no_dist=True,
            )
        (folder / PLAIN).write_text(json.dumps(snapshot.plain, indent=1) + "\n")

    return vault.write(parent, step, fill, keep)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been verified."""

    folder: Path
    step: int
    plain: dict[str, Any]


def find(parent: Path, step: int | None) -> Checkpoint:
    """The checkpoint of ``step``, or the last one. Raises ``UserError``, which offers the one before a damaged one."""
    there = vault.steps(parent)
    if not there:
        raise UserError(f"there is no checkpoint in {parent} to resume from; start a new run without --resume.")
    if step is not None and step not in there:
        raise UserError(f"there is no checkpoint of step {step} in {parent}; it has {', '.join(map(str, there))}.")
    chosen = there[-1] if step is None else step
    try:
        return _open(parent, chosen)
    except vault.Damaged as damage:
        for earlier in reversed([s for s in there if s < chosen]):
            try:
                _open(parent, earlier)
            except vault.Damaged:
                continue
            offer = f"the one of step {earlier} is whole: add --resume-from {earlier} to go on from there"
            break
        else:
            offer = "no earlier one is whole: start a new run without --resume"
        raise UserError(
            f"the checkpoint {parent / vault.name_of(chosen)} {damage}; nothing was loaded, and {offer}."
        ) from damage


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Bring back weights and optimizer state, to the bit. Raises ``UserError`` where they belong to another model."""
    snapshot = capture(model, optimizer, {})
    _compare(checkpoint, snapshot)
    tensors = {name: torch.empty_like(value) for name, value in snapshot.tensors.items()}
    with _one_process():
        reader = HuggingFaceStorageReader(str(checkpoint.folder))
        dcp.load(cast("dict[str, Any]", tensors), storage_reader=reader, no_dist=True)
    # State is what was saved; the groups' settings (lr, momentum, ...) are what this run asks for.
    now = cast("dict[str, Any]", get_optimizer_state_dict(model, optimizer, options=FLAT))
    settings = {name: value for name, value in now.items() if name.startswith("param_groups.")}
    weights = _under("model.", tensors)
    state = _under("optimizer.", tensors) | checkpoint.plain["numbers"]
    set_model_state_dict(model, weights | {name: weights[first] for name, first in _second_names(model).items()})
    set_optimizer_state_dict(model, optimizer, settings | state, options=FLAT)


def _open(parent: Path, step: int) -> Checkpoint:
    folder = parent / vault.name_of(step)
    files = vault.verify(folder, step)
    if folder / PLAIN not in files:
        raise vault.Damaged(f"lacks its file {PLAIN!r}")
    return Checkpoint(folder, step, json.loads((folder / PLAIN).read_text()))


def _compare(checkpoint: Checkpoint, expected: Snapshot) -> None:
    saved = HuggingFaceStorageReader(str(checkpoint.folder)).read_metadata().state_dict_metadata
    advice = "resume with the settings it was saved under, or start a new run without --resume."
    for name, tensor in expected.tensors.items():
        facts = saved.get(name)
        if not isinstance(facts, TensorStorageMetadata):
            raise UserError(f"the checkpoint {checkpoint.folder} lacks {name}, so it is of another model; {advice}")
        there, here = (tuple(facts.size), facts.properties.dtype), (tuple(tensor.shape), tensor.dtype)
        if there != here:
            raise UserError(
                f"in the checkpoint {checkpoint.folder} {name} is {there[0]} {there[1]}, and here it is {here[0]} "
                f"{here[1]}; {advice}"
            )
    foreign = sorted(set(saved) - set(expected.tensors))
    foreign += sorted(set(checkpoint.plain["numbers"]) ^ set(expected.plain["numbers"]))
    if foreign:
        raise UserError(f"the checkpoint {checkpoint.folder} does not fit this model in {foreign[0]}; {advice}")


def _second_names(model: nn.Module) -> dict[str, str]:
    """Of tied parameters: every further name, and the first one, under which alone the tensor is saved."""
    first: dict[int, str] = {}
    second: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            second[name] = first[id(parameter)]
    return second


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def _one_process() -> Generator[None]:
    """torch warns each time that there is no process group; here that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
