"""What one update costs, found by running it dry: the driver itself, on meta tensors, with
collectives that send nothing.

    flops     multiplications and additions of matrix products and small factorizations, by dtype
    memory    bytes that its operations read and write; ``touched``: those of matrix products among them
    sent      bytes that this rank sends, by axis, and in how many collectives
    peak      bytes of temporaries alive at once, beside weights, gradients and state

There is no second account: no rule declares what it needs, and no formula is repeated. A dry run stands for one kind of
device and for ordinary numbers; "cuda" stands for every device that the host does not wait for. Results are cached, one
for each distinct (rule, matrix, layout, counts). May import torch, `linalg`, `rules`, `stages`, `elementwise`, `slots`,
`layout`, `owners`, `parts` and this room.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import permutations
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..elementwise import ElementwiseRule, Entries
from ..layout import Axis, Replicas
from ..linalg.host_sync import simulating
from ..owners import next_owner, split_counts
from ..parts import Part, Side
from ..rules.matrix import MatrixRule
from ..slots import Slot
from ..stages import Batch
from .batcher import CallBatcher
from .comm import Comm, Pending
from .driver import update
from .gather import Task
from .pairs import gram
from .run import run
from .transport import Transport

# One dry run at a time: torch's dispatch modes in two threads at once end in a segmentation fault (2.13).
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
    peak: int = 0

    @property
    def total_flops(self) -> float:
        return sum(count for _, count in self.flops)

    @property
    def wire(self) -> Fraction:
        """Bytes that this rank sends."""
        return sum((each.bytes for each in self.sent), Fraction(0))

    def by_axis(self) -> dict[str, tuple[Fraction, int]]:
        """Return bytes and collectives over each axis, by its name and size."""
        found: dict[str, tuple[Fraction, int]] = {}
        for each in self.sent:
            before, calls = found.get(str(each.axis), (Fraction(0), 0))
            found[str(each.axis)] = before + each.bytes, calls + 1
        return found


class DryComm(Comm):
    """Sends nothing, and records what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self._before = Fraction(0)

    def _start(self, what: str, axis: Axis, call: Callable[[], Any]) -> Pending:
        self.sent.append(Sent(axis, what.split(" of ")[0], self.bytes - self._before))
        self._before = self.bytes
        return Pending(None, "")


# Matrix products by name, with the place of their first factor; in-place forms count alike. torch's own registry of
# flops would import Triton.
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
# Operations that compute nothing, apart from views.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift_fresh"}
MOST = 2**16  # entries of a cache

T = TypeVar("T")


@dataclass
class Count:
    """What torch has been asked to do. ``live``: bytes of results that are alive; ``peak``: the most so far."""

    flops: defaultdict[torch.dtype, float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0.0
    touched: float = 0.0
    live: int = 0
    peak: int = 0

    def add(self, known: Known) -> None:
        for dtype, count in known.flops:
            self.flops[dtype] += count
        self.memory += known.memory
        self.touched += known.touched
        self.peak = max(self.peak, self.live + known.peak)


class Made(NamedTuple):
    """A tensor as it was made, with ``size`` bytes of storage; ``given``: the index of the
    argument that it is, or None."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    size: int
    given: int | None


class Known(NamedTuple):
    """The cost of an operation for tensors of certain shapes. ``results``: one tensor, several, or none; None: torch
    has to be asked each time. ``peak``: bytes above what was alive before."""

    results: tuple[Made, ...] | Made | None
    flops: tuple[tuple[torch.dtype, float], ...] = ()
    memory: float = 0.0
    touched: float = 0.0
    peak: int = 0


# By function, shapes and options. torch's meta functions are Python and would take most of a dry run's time.
_known: dict[Any, Known] = {}


class Held(weakref.ref[Any]):
    """A storage that counts as long as it lives."""

    __slots__ = ("count", "size")
    count: Count
    size: int


_held: dict[int, Held] = {}


def _hold(storage: Any, count: Count, size: int) -> None:
    held = Held(storage, _gone)
    held.count, held.size = count, size
    _held[id(held)] = held
    count.live += size
    count.peak = max(count.peak, count.live)


def _gone(held: Held) -> None:
    held.count.live -= held.size
    del _held[id(held)]


class Meter(TorchDispatchMode):
    """Counts what torch is asked to do inside, and the memory that its results hold, but not what was there before."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.count = Count()
        self._device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # keeping torch.compile out takes as long as an operation, and nothing is compiled here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        key = (func, _described(args), *kwargs, _described((*kwargs.values(),)))
        known, out = _known.get(key), None
        if known is None:
            out = None if _is_fused(func) else func(*args, **kwargs)
            known = _remember(_known, key, _operation(func, args, kwargs, out))
        elif known.results is None:
            out = func(*args, **kwargs)
        self.count.add(known)
        return out if known.results is None else _again(known.results, (*args, *kwargs.values()), self.count)

    def once(self, f: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Count a function that is `dry_once`, running it only for shapes and options that are new."""
        key = (f, self._device, _described(args), *options, _described((*options.values(),)))
        given = (*args, *options.values())
        known = _known.get(key)
        if known is None:
            outside, self.count = self.count, Count()
            results = _made(f(*args, **options), given)
            assert results is not None, f"{f} returns views of its arguments"
            inside, self.count = self.count, outside
            flops = tuple(inside.flops.items())
            known = Known(results, flops, inside.memory, inside.touched, inside.peak)
            _remember(_known, key, known)
        self.count.add(known)
        return _again(known.results, given, None)  # `__torch_dispatch__` counts new tensors


def _again(results: Any, given: Sequence[Any], count: Count | None) -> Any:
    """Return new empty tensors, or the ones given, in place of an operation's results. ``count``: what new tensors are
    to be counted in, if they are not yet."""
    if not isinstance(results, Made):
        return tuple([_again(each, given, count) for each in results]) or None
    if results.given is not None:
        return _tensors(given)[results.given]
    made = torch.empty_strided(results.shape, results.stride, dtype=results.dtype, device="meta")
    if count is not None:
        _hold(made.untyped_storage(), count, results.size)
    return made


def _is_fused(func: Any) -> bool:
    """Return whether this is one of torch's fused optimizers, which have no form for meta
    tensors and return nothing."""
    return func._schema.name.startswith("aten::_fused")


def _remember(table: dict[Any, T], key: Any, value: T) -> T:
    if len(table) >= MOST:
        table.clear()
    table[key] = value
    return value


def _operation(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Known:
    """Return the cost of an operation that has returned ``out``."""
    name = func._schema.name.split("::")[-1]
    if _is_fused(func):  # all lists are read, and all but the gradients are written
        lists = [sum(x.numel() * x.element_size() for x in arg) for arg in args if isinstance(arg, (list, tuple))]
        return Known((), memory=2 * sum(lists) - lists[1])
    results = _made(out, (*args, *kwargs.values()))
    if name in FREE:
        return Known(results)
    inputs = _tensors(args)
    moved = sum(x.numel() * x.element_size() for x in (*inputs, *_tensors([out])))
    if (place := PRODUCTS.get(name.rstrip("_"))) is not None:
        left, right = args[place : place + 2]
        return Known(results, ((left.dtype, 2.0 * left.numel() * right.shape[-1]),), moved, moved)
    if name in FACTORIZATIONS and inputs:
        matrix = inputs[0]
        flops = FACTORIZATIONS[name] * matrix.numel() * matrix.shape[-1]
        return Known(results, ((matrix.dtype, flops),), moved)
    return Known(results, (), moved)


def _made(out: Any, given: Sequence[Any]) -> Any:
    """Return how results can be made again, or None if they cannot."""
    if isinstance(out, (tuple, list)):
        found = tuple(_made(each, given) for each in out)
        return None if None in found else found
    if not isinstance(out, Tensor) or not out.is_meta:
        return None
    tensors, storage = _tensors(given), out.untyped_storage()
    number = next((i for i, x in enumerate(tensors) if x is out), None)
    if number is None and any(x.untyped_storage() is storage for x in tensors):
        return None
    return Made(out.shape, out.stride(), out.dtype, storage.nbytes(), number)


def _described(arg: Any) -> Any:
    """Return everything about an argument that an operation may depend on."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.is_meta
    if isinstance(arg, (tuple, list)):
        return tuple([_described(each) for each in arg])
    return type(arg), arg


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among the arguments, and in lists among them."""
    return [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg]) if isinstance(x, Tensor)]


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
    """Return what one update of ``count`` matrices of one part costs this rank.

    ``dtype``: that of weights and gradients. ``device``: "cpu", or another kind whose results the host does not read;
    "meta", for models that are only described, counts as "cuda". If each replica keeps only the state of its own
    matrices, ``shares`` are the counts of all replicas and ``count`` is this one's. ``dealt`` as in `driver.update`.
    """
    device = "cuda" if device == "meta" else device
    plain = replace(rule, lr=0.0 if rule.lr == 0 else 1.0, weight_decay=0.5, rounding="nearest")
    comm = DryComm()
    transport = Transport(part, comm, CallBatcher(), first_owner, replicas, shares)
    owned = tuple([_owned(count, transport.first_owner, order) for order in permutations(part.axes)])
    key = (plain, _cut(part, replicas), dtype, device, count, owned, replicas, shares, dealt)
    with _ALONE:
        if (known := _dries.get(key)) is None:
            task = update(plain, _batch(plain, part, dtype, count, sum(shares) or count), transport, dealt)
            known = _remember(_dries, key, _metered(task, comm, device))
        return known


# By the shapes and counts that a rank has. Most of thousands of buckets differ only in which rank owns the remainder,
# and most ranks of a mesh have equal shapes and counts.
_dries: dict[Any, Dry] = {}


@lru_cache(maxsize=4096)
def _cut(part: Part, replicas: Replicas) -> Hashable:
    """Return all that a step depends on in how a part is sharded: the lengths of all pieces,
    and of this rank's piece."""

    def cut(side: Side) -> Hashable:
        lengths = [tuple(side.pieces(depth)) for depth in range(len(side.axes))]
        cuts = zip(side.axes, lengths, strict=True)
        return side.length, side.local_length, tuple([(str(axis), each, each[axis.coordinate]) for axis, each in cuts])

    own = [axis.coordinate for axis in part.replicas if replicas == "own"]
    return cut(part.rows), cut(part.columns), (*map(str, part.replicas),), (*map(str, part.unreduced_axes),), (*own,)


@lru_cache(maxsize=MOST)
def _owned(count: int, first: int, axes: Sequence[Axis]) -> Hashable:
    """Return how many of ``count`` matrices this rank has after each axis, dealt out one axis after the other. If
    counts differ, also return where this rank and its matrices lie, which decides what is sent: see `gather`."""
    found = list[Hashable]()
    for axis in axes:
        counts = split_counts(count, axis.size, first)
        start, count = sum(counts[: axis.coordinate]), counts[axis.coordinate]
        first = next_owner(first, axis)
        found.append((count, (start if count else None, axis.coordinate) if len(set(counts)) > 1 else None))
    return tuple(found)


def _batch(rule: MatrixRule, part: Part, dtype: torch.dtype, count: int, written: int) -> Batch:
    """Return ``count`` matrices with their state, and the weights of others up to ``written``."""
    here = (part.rows.local_length, part.columns.local_length)
    own = torch.empty(count, *here, dtype=dtype, device="meta")
    rest = [torch.empty(written - count, *here, dtype=dtype, device="meta")] if written > count else []
    gradient = torch.empty(count, *here, dtype=dtype, device="meta")
    state = {
        name: torch.empty(count, *_local(slot, part), dtype=slot.dtype, device="meta")
        for name, slot in rule.slots(part.matrix, dtype).items()
    }
    batch = Batch([own, *rest], [own], [gradient], state, part.matrix)
    if rule.direction.paired:
        m, n = part.matrix
        batch.gram_side = "rows" if m < n else "columns"
        batch.gram = torch.empty(count, min(m, n), min(m, n), dtype=torch.float64, device="meta")
    return batch


def dry_gram(part: Part, side: Literal["rows", "columns"], dtype: torch.dtype, device: str, count: int) -> Dry:
    """Return what the Gram matrices of ``count`` factors cost, see `pairs`."""
    device = "cuda" if device == "meta" else device
    comm = DryComm()
    X = torch.empty(count, part.rows.local_length, part.columns.local_length, dtype=dtype, device="meta")
    transport = Transport(part, comm, CallBatcher(), 0, "repeat")
    with _ALONE:
        return _metered(gram(X, side, transport), comm, device)


def _metered(task: Task, comm: DryComm, device: str) -> Dry:
    """Return what a task on tensors without values costs, which sends by ``comm``."""
    meter = Meter(device)
    with simulating(device, meter.once), meter:
        run([(task, 0)])
    counted = meter.count
    flops = tuple(counted.flops.items())
    return Dry(flops, counted.memory, counted.touched, tuple(comm.sent), counted.peak)


def dry_entries(rule: ElementwiseRule, dtype: torch.dtype, entries: int) -> Dry:
    """Return what a step of an elementwise rule costs for this many entries."""
    with _ALONE:
        return _dry_entries(replace(rule, lr=1.0, weight_decay=1.0, rounding="nearest"), dtype, entries)


@lru_cache(maxsize=1024)
def _dry_entries(rule: ElementwiseRule, dtype: torch.dtype, entries: int) -> Dry:
    meter = Meter()
    weight, gradient = (torch.empty(entries, dtype=dtype, device="meta") for _ in range(2))
    state = {  # numbers need values, because kernels may read them
        name: [torch.empty(entries, dtype=slot.dtype, device="meta") if slot.dims is None else torch.ones(())]
        for name, slot in rule.slots((entries,), dtype).items()
    }
    with meter:
        rule.step(Entries([weight], [gradient], state))
    return Dry(memory=meter.count.memory, peak=meter.count.peak)


def _local(slot: Slot, part: Part) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else part.side(dim).local_length for dim in slot.dims or ())


__all__ = ["Dry", "DryComm", "Meter", "Sent", "dry_entries", "dry_update"]
