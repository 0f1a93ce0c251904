"""What keeps the caller's context out of a step, wherever `step()` is called. May import torch alone.

torch keeps several settings with the thread that calls it: autocast would make products in bfloat16, a default device
(`torch.set_default_device`, `with torch.device(...)`) would put new tensors elsewhere, inference mode would make state
that can never be updated outside it. All are off within, for this thread alone. What is set for the whole process
(default dtype, deterministic algorithms, precision of float32 products) cannot be: other threads would see it change.
Code that runs within says the dtype and device of what it makes, and multiplies by `linalg.products`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def shielded() -> Generator[None]:
    """Run a block, or a function that this decorates, without gradients and as if it were called outside of any
    context. Dispatch modes stay: profilers and counters see a step."""
    with (
        torch.inference_mode(False),  # before no_grad: it turns gradients on
        torch.no_grad(),
        torch._C._DisableAutocast(),
        torch._C.DisableTorchFunction(),
    ):
        yield
