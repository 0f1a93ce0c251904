"""Whether the host may look at what the device has computed, to spare work that these very numbers do not need.

On a CPU looking is free. On any other device it waits for everything that was asked before, and in a CUDA graph there
is nobody to look: whatever is captured must be right for all numbers. So there is one question, asked wherever a
function has a shorter way for harmless numbers, and one place that answers it.
May import torch and the standard library.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# The kind of device that a dry run on meta tensors stands for; None: no dry run.
_simulated: ContextVar[str | None] = ContextVar("orthoshard_simulated", default=None)
_attended: ContextVar[bool] = ContextVar("orthoshard_attended", default=True)


def may_look(x: Tensor) -> bool:
    """Whether reading from ``x`` costs nothing: on a CPU, unless the caller is `unattended`."""
    return device_type(x) == "cpu" and _attended.get()


def holds(flag: Tensor) -> bool:
    """Read a flag that is up for ordinary matrices. A dry run has no numbers: there it is up."""
    return _simulated.get() is not None or bool(flag)


def device_type(x: Tensor) -> str:
    """The kind of device of ``x``, or what a dry run stands for."""
    return _simulated.get() or x.device.type


@contextmanager
def simulating(device: str) -> Generator[None]:
    """Within, meta tensors are worked on as those of such a device with ordinary numbers would be. Of this thread
    alone."""
    token = _simulated.set(device)
    try:
        yield
    finally:
        _simulated.reset(token)


@contextmanager
def unattended() -> Generator[None]:
    """Within, nothing is read on any device: what is done is what a captured step does. Of this thread alone."""
    token = _attended.set(False)
    try:
        yield
    finally:
        _attended.reset(token)
