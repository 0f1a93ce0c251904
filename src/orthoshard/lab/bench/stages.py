"""A step by stage: every torch operation of a step is timed, and counts for the stage whose code called it.

    gradients            largest entries, and the agreement of ranks on them
    accumulate           momentum and gradient, Nesterov's look ahead and back
    products             X Q and Xᵀ P
    orthonormalization   Cholesky QR and its relatives; Muon's polar factor
    error feedback       removing the captured part from the momentum
    weights              decay and update
    rest                 norms, scales, the next Q

The stage is read from the call stack: it is that of the innermost function of the library that is in `FUNCTIONS`, or
whose file is in `FILES`. In a direction it depends on which function of `linalg.products` is called. So directions and
engine need no code for this. The time of an operation is from call to return on a CPU; on CUDA it is the device time
that the profiler reports. May import torch, and ``orthoshard`` only for its path.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import orthoshard

GRADIENTS, ACCUMULATE, PRODUCTS, ORTHONORMAL, FEEDBACK, WEIGHTS, REST = STAGES = (
    "gradients",
    "accumulate",
    "products",
    "orthonormalization",
    "error feedback",
    "weights",
    "rest",
)

# Functions of files that serve several stages.
FUNCTIONS = {
    ("linalg/accumulate.py", "accumulate"): ACCUMULATE,
    ("linalg/accumulate.py", "scaled_copy"): PRODUCTS,
    ("linalg/accumulate.py", "take_product"): FEEDBACK,
    ("linalg/accumulate.py", "look_ahead"): ACCUMULATE,
    ("linalg/accumulate.py", "look_back"): ACCUMULATE,
    ("linalg/accumulate.py", "add_product"): WEIGHTS,
    ("linalg/accumulate.py", "add_product_and_rows"): WEIGHTS,
    ("linalg/accumulate.py", "add_scaled"): WEIGHTS,
}
# Files of one stage.
FILES = {
    "engine/gradients.py": GRADIENTS,
    "engine/agree.py": GRADIENTS,
    "engine/placing.py": GRADIENTS,
    **dict.fromkeys(
        (
            "linalg/cholesky.py",
            "linalg/columns.py",
            "linalg/dependent.py",
            "linalg/gram.py",
            "linalg/polar.py",
            "linalg/small.py",
            "linalg/symmetric.py",
        ),
        ORTHONORMAL,
    ),
}
# Functions of `linalg.products` that directions call.
CALLS = {"thin_matmul": PRODUCTS}
# Index of the first of the two factors among the arguments of a product.
FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
PREFIX = "stage: "


class Watch(TorchDispatchMode):
    """A context that records milliseconds, flops of products and number of operations, by stage."""

    def __init__(self, around: Callable[[str], Callable[[Callable[[], Any]], Any]] | None = None) -> None:
        super().__init__()
        self.milliseconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self.operations: dict[str, int] = defaultdict(int)
        self._call = self._timed if around is None else lambda stage, call: around(stage)(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        stage = stage_of(sys._getframe(1))
        self.operations[stage] += 1
        self.flops[stage] += product_flops(name, args)
        return self._call(stage, lambda: func(*args, **(kwargs or {})))

    def _timed(self, stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.milliseconds[stage] += (time.perf_counter() - start) * 1e3
        return result


def stage_of(frame: FrameType | None) -> str:
    """Return the stage of an operation that was called from ``frame``."""
    called = ""
    while frame is not None:
        file = _file(frame.f_code)
        if file is not None:
            name = frame.f_code.co_name
            called = name if file == "linalg/products.py" else called
            stage = FUNCTIONS.get((file, name)) or FILES.get(file)
            if stage is None and file.startswith("directions/"):
                stage = CALLS.get(called)
            if stage is not None:
                return stage
        frame = frame.f_back
    return REST


@cache
def _file(code: CodeType) -> str | None:
    """Return the path of the code's file inside the library, or None for other code."""
    here, root = Path(code.co_filename), Path(orthoshard.__file__).parent
    return here.relative_to(root).as_posix() if here.is_relative_to(root) else None


def product_flops(operation: str, args: tuple[Any, ...]) -> int:
    """Return 2 m k n for a product (m, k) (k, n), summed over a batch, and 0 for any other operation."""
    first = FACTORS.get(operation)
    if first is None:
        return 0
    left: Tensor = args[first]
    right: Tensor = args[first + 1]
    return 2 * prod(left.shape) * right.shape[-1]


def observe(step: Callable[[], object], device: torch.device) -> Watch:
    """Take one step and return what was recorded."""
    if device.type != "cuda":
        with Watch() as watch:
            step()
        return watch
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        with Watch(labelled) as watch:
            step()
        torch.cuda.synchronize()
    watch.milliseconds.update(device_milliseconds(record.key_averages()))
    return watch


def device_milliseconds(events: Iterable[Any]) -> dict[str, float]:
    """Return for each stage the device time of the kernels that were launched under its label.

    A label also appears as a range on the device, from its first kernel to its last. That is left out here, because it
    would count the kernels twice.
    """
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.key.startswith(PREFIX) and event.device_type == DeviceType.CPU:
            found[event.key.removeprefix(PREFIX)] += event.device_time_total / 1e3
    return found


def labelled(stage: str) -> Callable[[Callable[[], Any]], Any]:
    """Return a function that runs an operation under the stage's label, for the profiler."""

    def call(operation: Callable[[], Any]) -> Any:
        with record_function(PREFIX + stage):
            return operation()

    return call
