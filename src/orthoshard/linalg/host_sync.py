"""Whether the host may read what the device has computed, to spare work that these very numbers do not need.

On a CPU reading is free. On any other device it waits for everything launched before, and in a CUDA graph there is no
host: whatever is captured must be right for all numbers. So a function that has a shorter way for harmless numbers asks
one question, and this file answers it.
May import torch and the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# The kind of device that a dry run on meta tensors stands for; None: no dry run.
_simulated: ContextVar[str | None] = ContextVar("orthoshard_simulated", default=None)
_attended: ContextVar[bool] = ContextVar("orthoshard_attended", default=True)
# How a dry run calls a function that is `dry_once`: with the function and its arguments.
Shortcut = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_shortcut: ContextVar[Shortcut | None] = ContextVar("orthoshard_shortcut", default=None)


def sync_is_free(x: Tensor) -> bool:
    """Return whether reading from ``x`` costs nothing: on a CPU, unless the caller is within `no_host_sync`."""
    return device_type(x) == "cpu" and _attended.get()


def host_may_read() -> bool:
    """Return whether the host may read from a device at all: always, except within `no_host_sync`.
    On a device it then waits."""
    return _attended.get()


def holds(flag: Tensor) -> bool:
    """Read a flag that is up for ordinary matrices. A dry run has no numbers: its flags count as up."""
    return _simulated.get() is not None or bool(flag)


def all_zero(x: Tensor) -> bool:
    """Read whether all numbers of ``x`` are 0, as they are for ordinary matrices. In a dry run they count as 0."""
    return _simulated.get() is not None or not bool(x.any())


def host_numbers(x: Tensor, ordinary: Sequence[float]) -> list[Sequence[float]]:
    """Read the rows of ``x`` (b, k), which waits for the device. A dry run has ``ordinary`` numbers in each."""
    return [ordinary] * len(x) if _simulated.get() is not None else x.tolist()


def filled(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return whole numbers on a device, for a graph that is being captured: a copy from the host would be captured with
    the address of its source, and a fill carries its value."""
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])


def device_type(x: Tensor) -> str:
    """Return the kind of device of ``x``, or the one that a dry run stands for."""
    return _simulated.get() or x.device.type


def dry_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of tensors and plain options that does the same operations for all tensors of the same shapes.

    Dry runs execute it once for each set of shapes. Recursion on equal halves then costs only its depth.
    """

    @wraps(f)
    def called(*args: Any, **options: Any) -> Any:
        shortcut = _shortcut.get()
        return f(*args, **options) if shortcut is None else shortcut(f, args, options)

    return called


@contextmanager
def simulating(device: str, shortcut: Shortcut | None = None) -> Generator[None]:
    """Treat meta tensors inside as those of such a device with ordinary numbers would be
    treated; in this thread only."""
    tokens = _simulated.set(device), _shortcut.set(shortcut)
    try:
        yield
    finally:
        _simulated.reset(tokens[0])
        _shortcut.reset(tokens[1])


@contextmanager
def no_host_sync() -> Generator[None]:
    """Forbid reads from any device inside: code does what a captured step does; in this thread only."""
    token = _attended.set(False)
    try:
        yield
    finally:
        _attended.reset(token)
