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

_attended: ContextVar[bool] = ContextVar("orthoshard_attended", default=True)


def may_look(x: Tensor) -> bool:
    """Whether reading from ``x`` costs nothing: on a CPU, unless the caller is `unattended`."""
    return x.device.type == "cpu" and _attended.get()


@contextmanager
def unattended() -> Generator[None]:
    """Within, nothing is read on any device: what is done is what a captured step does. Of this thread alone."""
    token = _attended.set(False)
    try:
        yield
    finally:
        _attended.reset(token)
