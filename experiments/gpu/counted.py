"""What a step on one H100 is made of, counted on a machine without a GPU, and how long that would take there.

    python experiments/gpu/counted.py [--model llama-3.2-1b] [--layers 0] [--state-dtype float32] [--where]
                                                                                        a table of docs/numerics.md

The optimizer steps on meta tensors as it would on CUDA: with Triton's passes, which are launched nowhere, and with
answers of ordinary numbers where the host reads. Weights and gradients are bfloat16.

The model of time: each operation takes max(flops / rate, bytes / bandwidth), one after the other, and factorizations
what was measured. It leaves out launches, the host, and that no kernel reaches its bound.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from orthoshard import Dion, DionTail, Muon
from orthoshard.engine import dryrun, gradients, step
from orthoshard.engine.dryrun import FACTORIZATIONS, FREE, Meter
from orthoshard.kernels import add, ahead, copy, sweep, table
from orthoshard.kernels.forms import FORMS
from orthoshard.lab.bench.models import find_model
from orthoshard.linalg.host_sync import simulating

# Measured on an H100: benchmarks/results/h100-passes.json. Flops a second by dtype of the operands, bytes a second of a
# copy, and seconds of Cholesky and inverse triangle of (16, 512, 512), in proportion to b r³.
RATES = {torch.float16: 539e12, torch.bfloat16: 539e12, torch.float32: 35e12, torch.float64: 49e12}
BANDWIDTH = 3.0e12
FACTORIZATION = 0.6e-3 / (16 * 512**3)
LIBRARY, DRY_RUN = str(Path(step.__file__).parents[1]), str(dryrun.__file__)
# Full-size tensors that a pass of Triton writes besides its results, by their place among its arguments.
WRITTEN = {
    "accumulate": (0,), "look_ahead": (0,), "look_back": (0,), "scaled_copy": (), "wide_row_squares": (),
    "add_scaled": (0,), "add_product_and_rows": (0,), "add_products": (0, 2),
}  # fmt: skip
# The ranks of the products in a pass, from its arguments.
RANKS: dict[str, Callable[[Any], int]] = {
    "add_products": lambda args: args[1].right.shape[2] + args[3].right.shape[2],
    "add_product_and_rows": lambda args: args[2].shape[2],
}


class Counted(Meter):
    """Counts operations that compute, and the time of each by the model. A pass of Triton is one operation."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.calls = Counter[str]()
        self.seconds = defaultdict[str, float](float)
        self.operations = Counter[str]()  # by the line of the library that asks for them
        self.seconds_of = defaultdict[str, float](float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "set_":  # not for the meter, which would not move the tensor
            return func(*args, **(kwargs or {}))
        memory, flops = self.count.memory, dict(self.count.flops)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.is_view or name in (*FREE, "promote_types") or name.startswith("_record_function"):
            return out
        self.calls[name] += 1
        taken = (self.count.memory - memory) / BANDWIDTH
        if name in FACTORIZATIONS:
            self._takes("factorizations", args[0].numel() * args[0].shape[-1] * FACTORIZATION)
            return out
        added = {dtype: count - flops.get(dtype, 0) for dtype, count in self.count.flops.items()}
        narrow = added.get(torch.float16, 0) + added.get(torch.bfloat16, 0)
        kind = "full-size products" if narrow else "r x r and thin products" if any(added.values()) else "small passes"
        self._takes(kind, max(taken, *(count / RATES[dtype] for dtype, count in added.items()), 0))
        return out

    def _takes(self, kind: str, seconds: float) -> None:
        line = _line()
        self.seconds[kind] += seconds
        self.seconds_of[line] += seconds
        self.operations[line] += 1

    def form(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pass of Triton that is counted."""

        def counted(*args: Any, **options: Any) -> Any:
            out = f(*args, **options)
            moved = sum(map(_bytes, args)) + sum(_bytes(args[i]) for i in WRITTEN[name]) + _bytes(out)
            flops = 2.0 * sum(x.numel() for x in _tensors(args[0])) * RANKS.get(name, lambda *_: 0)(args)
            self.count.memory += moved
            self.count.flops[torch.float16] += flops
            self._takes("passes", max(moved / BANDWIDTH, flops / RATES[torch.float16]))
            return out

        return counted

    def launched(self, kernel: Any, *_: Any, **__: Any) -> None:
        self.calls[kernel.__name__] += 1


def _line() -> str:
    """Return the innermost line of the library, but for the dry run, that is being run."""
    frame = sys._getframe(2)
    while not frame.f_code.co_filename.startswith(LIBRARY) or frame.f_code.co_filename == DRY_RUN:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(LIBRARY)[1:]}:{frame.f_lineno} {frame.f_code.co_name}"


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from _tensors(each)


def _bytes(given: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(given))


@contextmanager
def on_an_h100(meter: Counted) -> Generator[None]:
    """Let steps on meta tensors take the way of CUDA, and count them."""

    def read(given: list[Tensor]) -> list[float]:
        gradients._largest(given)
        return [1.0] * len(given)

    def sent(device: torch.device, entries: list[table.Entry]) -> Tensor:
        return torch.empty(len(entries), len(entries[0]), dtype=torch.int64, device=device)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(patch.object(step, "largest_gradients", read))
        stack.enter_context(patch.object(table, "_table", sent))
        for room in (add, ahead, copy, sweep):
            stack.enter_context(patch.object(room, "launch", meter.launched))
            stack.enter_context(patch.object(room, "check", lambda *_: None))
        stack.enter_context(patch.dict(FORMS, {name: meter.form(name, form) for name, form in FORMS.items()}))
        stack.enter_context(simulating("cuda"))
        stack.enter_context(meter)
        yield


def counted(make: Callable[[list[nn.Parameter]], Any], shapes: list[tuple[int, ...]]) -> Counted:
    """Count a settled step."""
    weights = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = make(weights)
    optimizer.initialize_state()
    meter = Counted()
    for _ in range(2):
        meter = Counted()
        with on_an_h100(meter):
            optimizer.step()
    return meter


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="llama-3.2-1b")
    options.add_argument("--layers", type=int, default=0, help="0: all")
    options.add_argument("--state-dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--where", action="store_true", help="also every line's operations and ms")
    given = options.parse_args()
    shapes = list(find_model(given.model).first(given.layers).matrices)
    contestants: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        f"{rule.__name__} 1/{whole}": partial(rule, rank_fraction=1 / whole)
        for rule in (Dion, DionTail)
        for whole in (16, 4)
    }
    contestants["Muon"] = Muon
    for name, make in contestants.items():
        meter = counted(partial(make, kernels="triton", state_dtype=given.state_dtype), shapes)
        print(name)
        print("  operations that compute:", sum(meter.calls.values()))
        print("  Cholesky factorizations:", meter.calls["linalg_cholesky_ex"])
        flops = {str(dtype).removeprefix("torch."): f"{count / 1e12:.2f}" for dtype, count in meter.count.flops.items()}
        print("  TFLOP:", ", ".join(f"{count} {dtype}" for dtype, count in sorted(flops.items())))
        print(f"  GB read and written: {meter.count.memory / 1e9:.1f}")
        print(f"  GB of temporaries: {meter.count.peak / 1e9:.2f}")
        terms = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in sorted(meter.seconds.items()))
        print(f"  ms by the model: {sum(meter.seconds.values()) * 1e3:.1f} ({terms})", flush=True)
        if given.where:
            for line, seconds in sorted(meter.seconds_of.items(), key=itemgetter(1), reverse=True):
                print(f"    {seconds * 1e3:6.2f} ms {meter.operations[line]:4} operations  {line}")
    # torch's fused kernel reads and writes W and two moments, and reads G, each once
    moved = sum(map(math.prod, shapes)) * (3 * 2 + 4 * getattr(torch, given.state_dtype).itemsize)
    print(f"AdamW, fused\n  GB read and written: {moved / 1e9:.1f}\n  ms by the model: {moved / BANDWIDTH * 1e3:.1f}")


if __name__ == "__main__":
    main()
