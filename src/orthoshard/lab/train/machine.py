"""Device and precision of a run, and what is recorded about them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from orthoshard.lab.train.config import MachineConfig
from orthoshard.lab.train.errors import UserError, first_line


def device_of(config: MachineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise UserError(
            f"the device {config.device!r} cannot be used ({first_line(error)}); try --device cpu."
        ) from error
    return device


def autocast(config: MachineConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return a new autocast context for one forward pass, or a null context in float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision_of(config, device) == "bfloat16" else nullcontext()


def precision_of(config: MachineConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def describe(config: MachineConfig, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": str(device),
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision_of(config, device),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("orthoshard", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


class Stopwatch:
    """The time spent in a `with` block: by CUDA events on a GPU, by the host's clock elsewhere.

    Reading `seconds` waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)]
        self._times = [0.0, 0.0]

    def __enter__(self) -> Stopwatch:
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        self._times[which] = time.perf_counter()
        if self._events:
            self._events[which].record()

    @property
    def seconds(self) -> float:
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._times[1] - self._times[0]
