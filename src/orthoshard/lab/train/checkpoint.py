"""Saving and restoring model and optimizer: tensors by `torch.distributed.checkpoint`, everything else as JSON.

    shard-*.safetensors    model.<parameter>, optimizer.state.<parameter>.<name>, ...
    plain.json             {"step", "config", "data", "numbers": state other than tensors, "groups": lr, momentum, ...}

No pickle anywhere. Frozen parameters are not saved: the model brings them (see `orthoshard.lab.train.lora`). State is
saved under full parameter names (flattened optimizer state), so the same files can be read with another number of
processes and another sharding (see `orthoshard.lab.train.dcp_planner`). `capture` and `write` are separate functions so
that writing can overlap with training: several ranks wait only for a copy of their state on the CPU. One process does
not copy its state, and waits until it is written. torch's loader would silently convert what does not fit, so names,
shapes and dtypes are compared first.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from orthoshard.lab.train import atomic_dir
from orthoshard.lab.train.dcp_planner import Piece, load_pieces, piece_of, save_pieces, saved_tensors
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.ranks import ControlGroup

PLAIN = "plain.json"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
TRAINED = StateDictOptions(ignore_frozen_params=True)
# Not strict, because frozen parameters are missing; `_compare` has already checked the rest.
PART = StateDictOptions(strict=False)


@dataclass(frozen=True)
class Snapshot:
    """Everything that this rank writes into a checkpoint."""

    pieces: dict[str, Piece]
    plain: dict[str, Any]


def capture(model: nn.Module, optimizer: Optimizer, plain: dict[str, Any], copy: bool = False) -> Snapshot:
    """Return the current state: sharing memory with the model and the optimizer, or, with ``copy``, as a CPU copy."""
    tensors, numbers = _state(model, optimizer)
    pieces = {name: piece_of(name, tensor, copy) for name, tensor in tensors.items()}
    groups = [
        {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return Snapshot(pieces, plain | {"numbers": numbers, "groups": groups})


def write(parent: Path, step: int, snapshot: Snapshot, keep: int, control: ControlGroup | None = None) -> Path:
    """Write a new folder ``parent/step-...``, completely or not at all, and return its path.

    Each rank of ``control`` writes its pieces; rank 0 also writes plain.json.
    """
    control = control or ControlGroup()

    def fill(folder: Path) -> None:
        with _one_process() if control.group is None else nullcontext():
            save_pieces(folder, snapshot.pieces, control.group)
        if control.rank == 0:
            (folder / PLAIN).write_text(json.dumps(snapshot.plain, indent=1) + "\n", encoding="utf-8")

    return atomic_dir.write(parent, step, fill, keep, control)


def begin(write: Callable[[], Path], beside: bool) -> Future[tuple[Path, float]]:
    """Run ``write`` in a thread if ``beside``, else in this one, where Ctrl-C can interrupt it.

    The future holds the folder and the seconds that the write took. The thread is a daemon, unlike those of
    `dcp.async_save`: if another rank is gone, this process must be able to exit.
    """
    future: Future[tuple[Path, float]] = Future()
    begun = time.perf_counter()

    def body() -> None:
        try:
            future.set_result((write(), time.perf_counter() - begun))
        except (Exception, CheckpointException) as error:  # torch's is not a subclass of Exception
            future.set_exception(error)

    if beside:
        threading.Thread(target=body, daemon=True).start()
    else:
        body()
    return future


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that has been verified."""

    folder: Path
    step: int
    plain: dict[str, Any]


def find(parent: Path, step: int | None) -> Checkpoint:
    """Return the checkpoint of ``step``, or the last one for None.

    Raises ``UserError`` if there is none, or if it is damaged; the message then names the last intact one before it.
    """
    there = atomic_dir.steps(parent)
    if not there:
        raise UserError(f"there is no checkpoint in {parent} to resume from; start a new run without --resume.")
    if step is not None and step not in there:
        raise UserError(f"there is no checkpoint of step {step} in {parent}; it has {', '.join(map(str, there))}.")
    chosen = there[-1] if step is None else step
    try:
        return _open(parent, chosen)
    except atomic_dir.Damaged as damage:
        for earlier in reversed([s for s in there if s < chosen]):
            try:
                _open(parent, earlier)
            except atomic_dir.Damaged:
                continue
            offer = f"the one of step {earlier} is whole: add --resume-from {earlier} to go on from there"
            break
        else:
            offer = "no earlier one is whole: start a new run without --resume"
        raise UserError(
            f"the checkpoint {parent / atomic_dir.name_of(chosen)} {damage}; nothing was loaded, and {offer}."
        ) from damage


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, control: ControlGroup | None = None
) -> None:
    """Restore weights and optimizer state bit for bit. Raises ``UserError`` if they belong to another model."""
    expected, numbers = _state(model, optimizer)
    _compare(checkpoint, expected, numbers)
    tensors = {name: torch.empty_like(value) for name, value in expected.items()}
    pieces = {name: piece_of(name, tensor) for name, tensor in tensors.items()}
    with _one_process():
        (control or ControlGroup()).together(lambda: load_pieces(checkpoint.folder, pieces))
    # State comes from the checkpoint; the settings of the groups (lr, momentum, ...) come from this run.
    now = cast("dict[str, Any]", get_optimizer_state_dict(model, optimizer, options=FLAT))
    settings = {name: value for name, value in now.items() if name.startswith("param_groups.")}
    weights = _under("model.", tensors)
    state = _under("optimizer.", tensors) | checkpoint.plain["numbers"]
    weights |= {name: weights[first] for name, first in _second_names(model).items() if first in weights}
    set_model_state_dict(model, weights, options=PART)
    set_optimizer_state_dict(model, optimizer, settings | state, options=FLAT)


def _open(parent: Path, step: int) -> Checkpoint:
    folder = parent / atomic_dir.name_of(step)
    atomic_dir.verify(folder, step)
    try:
        return Checkpoint(folder, step, json.loads((folder / PLAIN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise atomic_dir.Damaged(f"has no {PLAIN} that can be read ({error})") from error


def _state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors of weights and optimizer state by their names in the files, and the state other than tensors."""
    second = _second_names(model)
    trained = get_model_state_dict(model, options=TRAINED)
    tensors = {f"model.{name}": value for name, value in trained.items() if name not in second}
    numbers: dict[str, Any] = {}
    for name, value in get_optimizer_state_dict(model, optimizer, options=FLAT).items():
        if name.startswith("param_groups."):  # the same for every parameter of a group
            continue
        if isinstance(value, torch.Tensor):
            tensors[f"optimizer.{name}"] = value
        else:
            numbers[name] = value
    return cast("dict[str, torch.Tensor]", tensors), numbers


def _compare(checkpoint: Checkpoint, expected: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    saved = saved_tensors(checkpoint.folder)
    advice = "resume with the settings it was saved under, or start a new run without --resume."
    for name, tensor in expected.items():
        facts = saved.get(name)
        if facts is None:
            raise UserError(f"the checkpoint {checkpoint.folder} lacks {name}, so it is of another model; {advice}")
        there, here = (tuple(facts.size), facts.properties.dtype), (tuple(tensor.shape), tensor.dtype)
        if there != here:
            raise UserError(
                f"in the checkpoint {checkpoint.folder} {name} is {there[0]} {there[1]}, and here it is {here[0]} "
                f"{here[1]}; {advice}"
            )
        if sum(chunk.sizes.numel() for chunk in facts.chunks) != tensor.numel():
            raise UserError(f"the checkpoint {checkpoint.folder} does not hold all of {name}; {advice}")
    foreign = sorted(set(saved) - set(expected))
    foreign += sorted(set(checkpoint.plain["numbers"]) ^ set(numbers))
    if foreign:
        raise UserError(f"the checkpoint {checkpoint.folder} does not fit this model in {foreign[0]}; {advice}")


def _second_names(model: nn.Module) -> dict[str, str]:
    """Map every further name of a tied parameter to its first name. The tensor is saved only under the first."""
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
    """Silence torch's warning that there is no process group; here that is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
