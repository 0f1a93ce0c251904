"""What one update costs, by running it dry: the driver itself, on meta tensors, with collectives that send nothing.

    flops     multiplications and additions of matrix products and small factorizations, by dtype
    memory    bytes that its operations read and write; ``touched``: those of matrix products among them
    sent      bytes that this rank sends, by axis, and in how many collectives
    launches  operations that compute something, views left out
    peak      bytes of temporaries alive at once, above weights, gradients and state

There is no second account: no rule declares what it needs, no formula is repeated. A dry run stands for one kind of
device and for ordinary numbers; "cuda" is what a device does that the host does not wait for. One for each distinct
(rule, matrix, layout, counts), kept. May import torch, `linalg`, `rules`, `stages`, `layout`, `parts` and this room.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import permutations
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..elementwise import ElementwiseRule, Entries
from ..layout import Axis, Replicas, deal, dealt_before, passed_on
from ..linalg.looking import simulating
from ..parts import Part
from ..rules.matrix import MatrixRule
from ..slots import Slot
from ..stages import Batch
from .comm import Comm, Pending
from .driver import update
from .joint import Joints
from .run import run
from .transport import Transport

# One at a time: torch's dispatch modes in two threads at once end in a segmentation fault (2.13).
_ALONE = Lock()


@dataclass(frozen=True)
class Sent:
    """One collective of one rank."""

    axis: Axis
    what: str
    bytes: Fraction


@dataclass(frozen=True)
class Dry:
    """What one update costs one rank."""

    flops: tuple[tuple[torch.dtype, float], ...] = ()
    memory: float = 0.0
    touched: float = 0.0
    sent: tuple[Sent, ...] = ()
    launches: int = 0
    peak: int = 0

    @property
    def total_flops(self) -> float:
        return sum(count for _, count in self.flops)

    @property
    def wire(self) -> Fraction:
        """Bytes that this rank sends."""
        return sum((each.bytes for each in self.sent), Fraction(0))

    def by_axis(self) -> dict[str, tuple[Fraction, int]]:
        """Bytes and collectives over each axis, by its name and size."""
        found: dict[str, tuple[Fraction, int]] = {}
        for each in self.sent:
            before, calls = found.get(str(each.axis), (Fraction(0), 0))
            found[str(each.axis)] = before + each.bytes, calls + 1
        return found


class DryComm(Comm):
    """Sends nothing, and writes down what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self._before = Fraction(0)

    def _start(self, what: str, axis: Axis, call: Callable[[], Any]) -> Pending:
        self.sent.append(Sent(axis, what.split(" of ")[0], self.bytes - self._before))
        self._before = self.bytes
        return Pending(None, "")


@dataclass
class Count:
    """What `Meter` has counted."""

    flops: defaultdict[torch.dtype, float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0.0
    touched: float = 0.0
    launches: int = 0
    live: int = 0
    peak: int = 0


# Matrix products by name, with the place of their first factor; what works in place does the same. torch's own registry
# of flops would bring Triton in with it.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
# Flops of factorizations, in r³ of their first input (..., r, r).
FACTORIZATIONS: dict[str, float] = {
    "linalg_cholesky_ex": 1 / 3,
    "linalg_inv_ex": 2.0,
    "linalg_solve_triangular": 1.0,
    "linalg_qr": 4 / 3,
    "linalg_lu_factor_ex": 2 / 3,
    "linalg_eigh": 9.0,
}
# Operations that compute nothing.
VIEWS = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "lift_fresh"}


class Meter(TorchDispatchMode):
    """Counts what is asked of torch within, and the memory that its results hold."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self._held: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name.startswith("_fused"):  # torch's fused optimizers have no form for meta tensors
            self.count.launches += 1
            lists = [sum(x.numel() * x.element_size() for x in arg) for arg in args if isinstance(arg, (list, tuple))]
            self.count.memory += 2 * sum(lists) - lists[1]  # all are read, and all but gradients written
            return None
        out = _entrywise(name, func, args) if not kwargs else None
        out = func(*args, **kwargs) if out is None else out
        results = _tensors([out])
        for result in results:
            self._hold(result)
        if func.is_view or name in VIEWS:
            return out
        self.count.launches += 1
        inputs = _tensors(args)
        moved = sum(x.numel() * x.element_size() for x in (*inputs, *results))
        self.count.memory += moved
        if (place := PRODUCTS.get(name.rstrip("_"))) is not None:
            left, right = args[place : place + 2]
            self.count.touched += moved
            self.count.flops[left.dtype] += 2.0 * left.numel() * right.shape[-1]
        elif name in FACTORIZATIONS and inputs:
            matrix = inputs[0]
            self.count.flops[matrix.dtype] += FACTORIZATIONS[name] * matrix.numel() * matrix.shape[-1]
        return out

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._held:
            return
        size = storage.nbytes()
        self._held[storage] = size
        self.count.live += size
        self.count.peak = max(self.count.peak, self.count.live)
        _when_gone(storage, self.count, size)


# Operations entry by entry, whose results are known without torch's own meta functions: in Python these take most of
# the time of a dry run. By name, whether the result is a flag.
NUMBERS = """add sub rsub mul div maximum minimum pow where hypot sqrt rsqrt reciprocal neg abs square clamp clamp_min
triu nan_to_num bitwise_and bitwise_or bitwise_not"""
FLAGS = "gt lt ge le eq ne logical_and logical_or logical_not"
ENTRYWISE = {**dict.fromkeys(NUMBERS.split(), False), **dict.fromkeys(FLAGS.split(), True)}


def _entrywise(name: str, func: Any, args: Sequence[Any]) -> Tensor | None:
    """An empty result of an operation entry by entry; None: torch has to say what it is."""
    if name.removesuffix("_") not in ENTRYWISE or func._overloadname == "out":
        return None
    if name.endswith("_"):
        return args[0]
    tensors = _tensors(args)
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    alone = len(tensors) == 1 and name in ("clamp", "clamp_min", "triu")
    first, second = args[1:3] if name == "where" else (args[0], args[0]) if alone else (*args, args[0])[:2]
    dtype = torch.bool if ENTRYWISE[name] else torch.result_type(first, second)
    return torch.empty(shape, dtype=dtype, device="meta")


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Those among the arguments, and in lists of them."""
    return [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg]) if isinstance(x, Tensor)]


def _when_gone(storage: Any, count: Count, size: int) -> None:
    def gone() -> None:
        count.live -= size

    weakref.finalize(storage, gone)


def dry_update(
    rule: MatrixRule,
    part: Part,
    dtype: torch.dtype,
    device: str,
    count: int,
    first_owner: int = 0,
    replicas: Replicas = "repeat",
    shares: tuple[int, ...] = (),
    dealt: bool = False,
) -> Dry:
    """What one update of ``count`` matrices of one part costs this rank. ``dtype``: that of weights and gradients;
    ``device``: "cpu", or another kind, whose host does not look. Where each replica keeps the state of its own alone,
    ``shares`` are the matrices of every replica, and ``count`` this one's. ``dealt`` as in `driver.update`."""
    plain = replace(rule, lr=0.0 if rule.lr == 0 else 1.0, weight_decay=1.0, rounding="nearest")
    with _ALONE:
        first_owner = _alike(part, count, replicas, first_owner)
        return _dry(plain, part, dtype, device, count, first_owner, replicas, shares, dealt)


# By (part, matrices, replicas) and how many of them this rank owns in any order of axes: a first owner that did so.
_first_owners: dict[Any, int] = {}


def _alike(part: Part, count: int, replicas: Replicas, first_owner: int) -> int:
    """A first owner that has been run dry already and deals this rank as many matrices, along whatever axes in whatever
    order; or this one. Of thousands of buckets most differ by that alone."""
    first = dealt_before(first_owner, part.replicas if replicas == "own" else ())
    owned = tuple(tuple(_owned(count, first, order)) for order in permutations(part.axes))
    return _first_owners.setdefault((part, count, replicas, owned), first_owner)


def _owned(count: int, first: int, axes: Sequence[Axis]) -> Iterator[int]:
    """How many of ``count`` matrices are this rank's after each axis, dealt out one after the other."""
    for axis in axes:
        count = deal(count, axis.size, first)[axis.coordinate]
        first = passed_on(first, axis)
        yield count


@lru_cache(maxsize=4096)
def _dry(
    rule: MatrixRule, part: Part, dtype: torch.dtype, device: str, count: int, first_owner: int, replicas: Replicas,
    shares: tuple[int, ...], dealt: bool,
) -> Dry:  # fmt: skip
    comm, meter = DryComm(), Meter()
    written = sum(shares) if shares else count
    here = (part.rows.here, part.columns.here)
    own = torch.empty(count, *here, dtype=dtype, device="meta")
    rest = [torch.empty(written - count, *here, dtype=dtype, device="meta")] if written > count else []
    gradient = torch.empty(count, *here, dtype=dtype, device="meta")
    slots = rule.slots(part.matrix, dtype)
    state = {
        name: torch.empty(count, *_local(slot, part), dtype=slot.dtype, device="meta") for name, slot in slots.items()
    }
    batch = Batch([own, *rest], [own], [gradient], state, part.matrix)
    transport = Transport(part, comm, Joints(), first_owner, replicas, list(shares) or [count])
    with simulating(device), meter:
        run([update(rule, batch, transport, dealt)])
    counted = meter.count
    flops = tuple(counted.flops.items())
    return Dry(flops, counted.memory, counted.touched, tuple(comm.sent), counted.launches, counted.peak)


def dry_entries(rule: ElementwiseRule, dtype: torch.dtype, entries: int) -> Dry:
    """What a step of an elementwise rule costs for so many entries."""
    with _ALONE:
        return _dry_entries(replace(rule, lr=1.0, weight_decay=1.0, rounding="nearest"), dtype, entries)


@lru_cache(maxsize=1024)
def _dry_entries(rule: ElementwiseRule, dtype: torch.dtype, entries: int) -> Dry:
    meter = Meter()
    weight, gradient = (torch.empty(entries, dtype=dtype, device="meta") for _ in range(2))
    state = {
        name: [torch.empty(entries if slot.dims is None else (), dtype=slot.dtype, device="meta")]
        for name, slot in rule.slots((entries,), dtype).items()
    }
    with meter:
        rule.step(Entries([weight], [gradient], state))
    return Dry(memory=meter.count.memory, launches=meter.count.launches, peak=meter.count.peak)


def _local(slot: Slot, part: Part) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else part.side(dim).here for dim in slot.dims or ())


__all__ = ["Dry", "DryComm", "Meter", "Sent", "dry_entries", "dry_update"]
