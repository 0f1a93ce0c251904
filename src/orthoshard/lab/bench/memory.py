"""Memory of a contestant: bytes of state, and the peak of a step above its start.

On CUDA the allocator reports the peak. On a CPU it is the running sum of allocations and releases that torch's profiler
records during one untimed step; this does not include what a BLAS allocates for itself. May import torch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "measured step"
CPU = 0  # the profiler's number for the device


def tensors(value: Any) -> Iterable[Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(cast("dict[Any, Any]", value).values()))
    elif isinstance(value, list | tuple):
        for item in cast("Iterable[Any]", value):
            yield from tensors(item)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all state tensors. Each view of a shared allocation counts its own bytes."""
    return sum(x.numel() * x.element_size() for x in tensors(dict(optimizer.state)))


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the largest number of bytes that one step holds in addition to those held when it began."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()  # so that the profiler knows the allocations that the measured step releases
        with record_function(MEASURED):
            step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    start = next(float(event["ts"]) for event in events if event.get("name") == MEASURED)
    changes = sorted(
        (float(event["ts"]), int(event["args"]["Bytes"]))
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == CPU
    )
    held = list(accumulate((change for _, change in changes), initial=0))
    before = held[sum(time < start for time, _ in changes)]
    during = (level for (time, _), level in zip(changes, held[1:], strict=True) if time >= start)
    return max((before, *during)) - before


@contextmanager
def _quiet() -> Generator[None]:
    """Discard the messages that the profiler's C++ code writes to stderr."""
    sys.stderr.flush()
    screen = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(screen, 2)
        os.close(screen)
