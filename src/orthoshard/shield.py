"""Keep the caller's context out of a step, wherever `step()` is called. May import torch alone.

torch has several settings for each thread: autocast would compute products in bfloat16, a default device
(`torch.set_default_device`, `with torch.device(...)`) would put new tensors elsewhere, and inference mode would make
state that can never be updated outside it. `shielded` turns them off, for this thread alone. It leaves settings of the
whole process (default dtype, deterministic algorithms, precision of float32 products), because other threads would see
them change. Code within `shielded` names the dtype and device of each new tensor, and multiplies by `linalg.products`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def shielded() -> Generator[None]:
    """Run a block or a decorated function without gradients, as if called outside of any context. Dispatch modes stay
    on, so profilers and counters see a step."""
    with (
        torch.inference_mode(False),  # before no_grad, because it turns gradients on
        torch.no_grad(),
        torch._C._DisableAutocast(),
        torch._C.DisableTorchFunction(),
    ):
        yield
