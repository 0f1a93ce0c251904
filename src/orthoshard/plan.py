"""From groups and layouts to buckets: the parameters that are updated together. Pure, frozen, printable.

Matrices of one group, shape, layout, dtype and device form one bucket, up to a size limit, so that the arithmetic of a
step is batched and their state is one allocation. Parameters of an elementwise rule form one bucket whatever their
shapes. May import `rules`, `groups`, `params`, `views`, `layout`, `owners`, `parts` and `cost`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from .cost import UPDATE_BYTES, Alike
from .groups import group_rule, made_up, rule_class
from .layout import AVERAGE, PLACED, Axis, Layout, Replicas, meshes_of, read_layout
from .owners import rank_on, split_counts
from .params import partner_of, refuse_pieces
from .parts import Part, parts_of, state_layout
from .rule import Rule
from .rules import MatrixRule
from .slots import Slot, state_device
from .views import MatrixView, Named, read_view

# Most bytes of one bucket's matrices on one rank. Large enough that a batch fills any device, small enough that several
# buckets are in flight and that a step's temporaries (Muon's: four times a bucket) stay small beside the model.
BUCKET_BYTES = 128 * 2**20
# On a device every bucket costs launches: Dion 1/16 of Llama-3.2-1B takes 1,400 launches with 15 buckets, 640 with 5.
BUCKET_BYTES_ELSEWHERE = 512 * 2**20
# Dtypes of weights that a step can write, and of gradients.
TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Parameters of elementwise rules with fewer entries keep their state on their device even under `state_offload`.
SMALL = 2**16


@dataclass(frozen=True)
class Pair:
    """The pair that a factor belongs to: its partner's name, the side of this factor along which their common length
    lies, and (m, n) of their product."""

    partner: str
    side: Named
    product: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """One parameter in the plan: the ``index``-th of group ``group``."""

    name: str
    group: int
    index: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    view: MatrixView | None  # the matrices as which its rule treats it; None: the rule treats it entry by entry
    slots: tuple[tuple[str, Slot], ...]  # for the whole parameter: lengths are those of its longest matrix
    rule: str  # with its options, except learning rate and decay
    owners: tuple[Axis, ...] = ()  # axes of the replicas of which one keeps its state; none: each replica keeps it
    owner: int = 0  # the number, by `rank_on`, of the replica that keeps its state
    offload: bool = False  # whether its state is in host memory
    pair: Pair | None = None  # the pair of which it is a factor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def state_layout(self, slot: Slot) -> Layout:
        """Return the layout of a slot: it is cut as the dimensions of the parameter that it follows."""
        if slot.dims is None:
            return self.layout
        return state_layout(self.view, self.layout, slot.dims) if self.view else Layout((), ())

    @property
    def state_device(self) -> torch.device:
        """The device of its state."""
        return state_device(self.device, self.offload)

    @cached_property
    def batch_dims(self) -> int:
        """The number of leading dimensions that count matrices."""
        return self.view.batch_dims if self.view else 0

    @cached_property
    def batch(self) -> int:
        """The number of its experts on this rank, cut or whole; 1 if it has none."""
        return prod(self.layout.local[: self.batch_dims])

    def plain(self, tensor: Tensor) -> Tensor:
        """Return the tensor, or a contiguous copy if the view cannot take its strides, as those of channels_last."""
        return tensor if self.view and self.view.plain else tensor.contiguous()

    def stack(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the local shape as (B, ...), after `plain`: dimensions that count matrices are joined, or
        a new one is added."""
        x = self.plain(tensor)
        return x.flatten(0, self.batch_dims - 1) if self.batch_dims else x.unsqueeze(0)

    @cached_property
    def is_owner(self) -> bool:
        """Whether its state is on this rank, cut or whole."""
        return self.owner == rank_on(self.owners)

    @property
    def local_slots(self) -> tuple[tuple[str, Slot], ...]:
        """The slots of the state that is on this rank."""
        return self.slots if self.is_owner else ()

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the state that is on this rank."""
        return sum(prod(self.state_layout(slot).local) * slot.dtype.itemsize for _, slot in self.local_slots)

    @property
    def bucket_key(self) -> tuple[Any, ...]:
        """The key by which entries form buckets: equal on every rank of the mesh."""
        if not self.view:
            return ()
        before, layout = self.batch_dims, self.layout
        cuts = layout.shard_axes[:before] if any(layout.shard_axes[:before]) else ()
        return (
            self.view.text,
            self.shape[before:],
            cuts,
            layout.shard_axes[before:],
            layout.replicas,
            layout.unreduced_axes,
            self.pair and (self.pair.side, self.pair.product),
        )

    @property
    def signature(self) -> str:
        """A text that must be equal on every rank that shares the parameter."""
        view = self.view and self.view.text
        state = f"{self.slots} {self.owner} {self.offload}"
        return f"{self.name} {self.shape} {self.dtype} {self.layout} {view} {state} {self.rule}"


@dataclass(frozen=True)
class BucketUpdate:
    """One update: all matrices of one part that a bucket has, or a slice of them if they exceed the limit.

    slots        the state of a matrix
    matrices     the number of matrices, on this rank or others
    first_owner  the number of matrices in earlier updates on the same mesh: dealing continues at the rank where these
                 ended, so no rank gets every remainder
    replicas     what ranks that hold the same matrices do
    dealt        whether whole matrices are dealt to owners, where the direction runs
    peak         upper bound of the bytes of temporaries on the rank that has most, with copies of offloaded state. If
                 nothing is sharded or replicated, a nominal number instead: there updates in flight share launches,
                 which a device waits for, so as many are admitted as have the weights of four full buckets
    """

    part: Part
    slots: tuple[tuple[str, Slot], ...]
    matrices: int
    first_owner: int
    replicas: Replicas
    dealt: bool = False
    peak: int = 0


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group whose state is one allocation, and their updates: one for each part of their view, for
    all parameters at once; none under elementwise rules. ``averaged``: replicas have gradients of their own, which
    are averaged first."""

    group: int
    entries: tuple[Entry, ...]
    updates: tuple[BucketUpdate, ...]
    averaged: bool

    @property
    def owners(self) -> tuple[Axis, ...]:
        """The axes of the replicas that divide its state; none if each replica keeps all of it."""
        return self.entries[0].owners

    @cached_property
    def local_batches(self) -> list[int]:
        """For each entry, the number of experts whose state is on this rank, cut or whole."""
        return [entry.batch * entry.is_owner for entry in self.entries]

    def parameters(self, groups: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Return the parameters of the entries, as the groups have them now."""
        members = groups[self.group]["params"]
        return [members[entry.index] for entry in self.entries]

    def local_count(self, update: BucketUpdate) -> int:
        """Return the number of an update's matrices whose state is on this rank, cut or whole."""
        return sum(update.part.count(entry.batch) for entry in self.entries if entry.is_owner)

    def shares(self, update: BucketUpdate | None = None, first: int = 0, last: int | None = None) -> list[int]:
        """Return, for each owner, the number of an update's matrices in entries first..last-1 whose state it keeps;
        without an ``update``, the number of experts. Entries are in the order of their owners. The list is empty if
        every replica keeps all state."""
        counts = [0] * (prod(axis.size for axis in self.owners) if self.owners else 0)
        for entry in self.entries[first:last] if self.owners else ():
            counts[entry.owner] += update.part.count(entry.batch) if update else entry.batch
        return counts

    def stretches(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of entries whose state travels together: all if it is one allocation, else as many as
        have at most ``most`` bytes on this rank, and at least one."""
        first, held = 0, 0
        for number, entry in enumerate(self.entries if not self.updates else ()):
            if number > first and held + entry.state_bytes > most:
                yield first, number
                first, held = number, 0
            held += entry.state_bytes
        yield first, len(self.entries)


@dataclass(frozen=True)
class Plan:
    """All buckets of an optimizer, in the order in which every rank works through them."""

    buckets: tuple[Bucket, ...]

    def __str__(self) -> str:
        matrices = sum(update.matrices for bucket in self.buckets for update in bucket.updates)
        return f"{len(self.entries)} parameters in {len(self.buckets)} buckets, with {matrices} matrices"

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every parameter, in the order of the buckets."""
        return tuple(entry for bucket in self.buckets for entry in bucket.entries)

    def parameters(self, groups: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Return the parameters of the entries, as the groups have them now."""
        return [parameter for bucket in self.buckets for parameter in bucket.parameters(groups)]

    @cached_property
    def groups(self) -> list[Any]:
        """Every process group over which a step sends."""
        axes = {axis for entry in self.entries for axis in entry.layout.axes}
        return [axis.group for axis in sorted(axes, key=lambda axis: axis.key)]

    @cached_property
    def meshes(self) -> list[tuple[tuple[Axis, ...], list[int]]]:
        """Each set of axes that holds parameters, with the numbers of these parameters in `entries`."""
        return meshes_of([entry.layout for entry in self.entries])


def options_of(group: dict[str, Any]) -> str:
    """Return the options of a group that ranks compare: all of its rule's, except learning rate and decay."""
    return repr(replace(group_rule(group), lr=0.0, weight_decay=0.0))


def offloads(group: dict[str, Any], parameter: Tensor) -> bool:
    """Return whether the state of a parameter is kept in host memory: not that of small parameters of elementwise
    rules, where many small copies would save little."""
    return group["state_offload"] and (rule_class(group).matrices or parameter.numel() >= SMALL)


def build_plan(groups: Sequence[dict[str, Any]], replicas: Any = None) -> Plan:
    """Return the plan of groups whose keys are complete. Raises ValueError, naming the parameter, if its rule
    cannot treat it.

    Frozen parameters and parameters of 0 entries are left out. ``replicas`` is the process group over which plain
    tensors are replicated.
    """
    buckets: dict[tuple[Any, ...], list[Entry]] = {}
    turns, entries, kinds = _turns(groups), list[Entry](), dict[Any, Entry]()
    for number, group in enumerate(groups):
        names = group.get("param_names") or ()
        for index, parameter in enumerate(group["params"]):
            if not parameter.requires_grad or not parameter.numel():
                continue
            name = names[index] if index < len(names) else made_up(number, index)
            refuse_pieces(name, parameter)
            _refuse_untrainable(name, parameter)
            kind = (number, _kind(parameter))
            if kind not in kinds:
                kinds[kind] = _entry(name, number, parameter, group, replicas)
            owner = turns[id(parameter)] % prod(axis.size for axis in kinds[kind].owners)
            entries.append(replace(kinds[kind], name=name, index=index, owner=owner))
    for entry in _with_pairs(entries, groups):
        key = (entry.group, entry.bucket_key, entry.dtype, entry.device, entry.offload)
        buckets.setdefault(key, []).append(entry)
    first_owner, planned = Counter[tuple[Any, ...]](), list[Bucket]()
    for (number, *_), alike in buckets.items():
        group = groups[number]
        ways = _ways(alike, group)
        for stretch in _capped(alike, ways) if ways else [alike]:
            members = sorted(stretch, key=lambda entry: entry.owner)
            mesh = tuple(sorted(axis.key for axis in members[0].layout.axes))
            updates = tuple(_updates(members, group_rule(group), ways, first_owner[mesh]))
            planned.append(Bucket(number, tuple(members), updates, _averaged(members[0], updates)))
            first_owner[mesh] += sum(update.matrices for update in updates)
    return Plan(tuple(planned))


def _with_pairs(entries: Sequence[Entry], groups: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    """Yield the entries, those of a rule of pairs with their `Pair`. Raises ValueError for a parameter whose name is
    not that of a factor, or whose partner is missing."""
    factors = {entry.name: entry for entry in entries if rule_class(groups[entry.group]).paired}
    for entry in entries:
        if entry.name not in factors:
            yield entry
            continue
        found = partner_of(entry.name)
        other = factors.get(found[0]) if found else None
        if not (found and other and entry.view and other.view) or entry.view.blocks or other.view.blocks:
            what = f"has no partner {found[0]!r} that trains under the same rule" if found else "is named otherwise"
            raise ValueError(
                f"rule {groups[entry.group]['rule']!r} is for the two factors of a matrix, named lora_A and lora_B as "
                f"PEFT does, and parameter {entry.name!r} {what}: pass the model itself, or (name, parameter) pairs of "
                f"both, without blocks, and give others another rule, such as 'muon'"
            )
        (m, n), (p, q) = entry.view.sizes[0], other.view.sizes[0]
        yield replace(entry, pair=Pair(found[0], found[1], (p, n) if found[1] == "rows" else (m, q)))


def _turns(groups: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Return the owner index of each parameter (by identity), round-robin over equal shapes and placements. Frozen
    parameters count as well, and groups in their order, so no state moves if parameters are frozen or groups added."""
    found: dict[int, int] = {}
    for group in groups:
        alike: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            alike.setdefault((parameter.shape, getattr(parameter, "placements", ())), []).append(parameter)
        for members in alike.values():
            found |= {id(parameter): turn for turn, parameter in enumerate(members, len(found))}
    return found


@dataclass(frozen=True)
class _Way:
    """How the matrices of one part are updated, in one or several buckets; ``most``: number of them at a time."""

    part: Part
    replicas: Replicas
    dealt: bool
    most: int


def _ways(entries: Sequence[Entry], group: dict[str, Any]) -> list[_Way]:
    """Return one way for each part of alike entries; none if they are no matrices."""
    first, rule = entries[0], group_rule(group)
    if not first.view:
        return []
    assert isinstance(rule, MatrixRule)
    parts, ways = parts_of(first.view, first.layout), list[_Way]()
    factors = _factors(group, rule, parts, first)
    count = max(1, min(len(entries), _limit(first) // _size(first)))
    for part in parts:
        replicas, whole = (factors, False) if factors else _way(group, rule, part, first)
        matrices = count * max(_matrices(part, entry) for entry in entries)
        most = _alike(rule, part, first).most_matrices(matrices, replicas, whole)
        ways.append(_Way(part, replicas, whole, most))
    return ways


def _matrices(part: Part, entry: Entry) -> int:
    """Return the number of matrices that a part has of an entry, on the rank that has most; the same on every rank."""
    assert entry.view
    cuts = entry.layout.shard_axes[: entry.batch_dims + part.blocks_as_batch]
    experts = prod(entry.shape[: entry.batch_dims]) * (len(entry.view.blocks) if part.blocks_as_batch else 1)
    return -(-experts // prod(axis.size for axes in cuts for axis in axes))


def _updates(entries: Sequence[Entry], rule: Rule, ways: Sequence[_Way], first_owner: int) -> Iterator[BucketUpdate]:
    first = entries[0]
    # A parameter above a limit is updated in slices of its experts: the same slices on every rank.
    here = prod(first.shape[: first.batch_dims]) // prod(
        a.size for axes in first.layout.shard_axes[: first.batch_dims] for a in axes
    )
    for way in ways:
        part, matrices = way.part, sum(_matrices(way.part, entry) for entry in entries)
        wanted = max(-(-_size(first) // _limit(first)), -(-matrices // way.most))
        slices = 1 if len(entries) > 1 else max(1, min(here, wanted))
        blocks = len(first.view.blocks) if first.view and part.blocks_as_batch else 1
        experts = sum(prod(entry.shape[: entry.batch_dims]) for entry in entries)
        assert isinstance(rule, MatrixRule)
        slots = tuple(rule.slots(part.matrix, first.dtype).items())
        most = -(-matrices // slices)
        if part.axes:
            peak = _alike(rule, part, first).held_at_most(most, way.replicas, way.dealt)
        else:  # `engine.run` admits 3 UPDATE_BYTES of peaks at once; a full bucket takes a quarter of that
            share = most * prod(part.matrix) * first.dtype.itemsize / _limit(first)
            peak = int(min(1.0, share) * 3 * UPDATE_BYTES / 4)
        if first.offload:
            peak += most * _state_bytes(part.typical(), slots)
        for i, count in enumerate(split_counts(experts, slices, 0)):
            some = replace(part, some=(i, slices))
            yield BucketUpdate(some, slots, blocks * count, first_owner, way.replicas, way.dealt, peak)
            first_owner += blocks * count


def _state_bytes(part: Part, slots: Sequence[tuple[str, Slot]]) -> int:
    """Return the bytes of the state of one matrix on this rank."""
    lengths = [[d if isinstance(d, int) else part.side(d).local_length for d in slot.dims or ()] for _, slot in slots]
    return sum(prod(each) * slot.dtype.itemsize for each, (_, slot) in zip(lengths, slots, strict=True))


def _factors(group: dict[str, Any], rule: Rule, parts: Sequence[Part], entry: Entry) -> Replicas | None:
    """Return how replicas exchange the factors of such parameters, or None if they exchange gradients: as the group
    says, or for "auto" as each part sends less."""
    if not entry.layout.unreduced_axes or not rule.factors or group["replica_sync"] == "gradients":
        return None
    assert isinstance(rule, MatrixRule)
    kinds = [Alike(rule, part, entry.dtype, "cuda") for part in parts]  # any device: only bytes are compared
    if group["replica_sync"] == "auto" and not all(kind.worth_averaging() for kind in kinds):
        return None
    return "average" if group["reduce_dtype"] is None else "average_bfloat16"


def _way(group: dict[str, Any], rule: Rule, part: Part, entry: Entry) -> tuple[Replicas, bool]:
    """Return what replicas with equal gradients do, and whether whole matrices are dealt to owners: as the group says,
    or the cheapest."""
    assert isinstance(rule, MatrixRule)
    replicas: Sequence[Replicas] = ("split", "repeat")
    if not part.replicas:
        replicas = ("repeat",)
    elif entry.owners:
        replicas = ("own",)
    elif group["replica_compute"] != "auto":
        replicas = (group["replica_compute"],)
    dealt = {"auto": (False, True), "in_place": (False,), "dealt": (True,)}[group["shard_compute"]]
    if not part.over("both") or not rule.direction.dealable:
        dealt = (False,)
    elif rule.direction.paired:
        dealt = (True,)
    return _alike(rule, part, entry).cheapest([(way, whole) for way in replicas for whole in dealt])


def _alike(rule: MatrixRule, part: Part, entry: Entry) -> Alike:
    return Alike(rule, part, entry.dtype, entry.device.type)


def _averaged(entry: Entry, updates: Sequence[BucketUpdate]) -> bool:
    """Return whether the gradients of such parameters have to be averaged before anything else."""
    return bool(entry.layout.unreduced_axes) and not any(update.replicas in AVERAGE for update in updates)


def _capped(entries: list[Entry], ways: Sequence[_Way]) -> Iterator[list[Entry]]:
    """Yield the entries, in order, in stretches of at most `_limit` bytes of weights and as many matrices as their ways
    take at a time; the same stretches on every rank."""
    stretch, size, counts = list[Entry](), 0, [0] * len(ways)
    for entry in entries:
        more = [_matrices(way.part, entry) for way in ways]
        full = any(count + one > way.most for count, one, way in zip(counts, more, ways, strict=True))
        if stretch and (full or size + _size(entry) > _limit(entry)):
            yield stretch
            stretch, size, counts = [], 0, [0] * len(ways)
        stretch.append(entry)
        size += _size(entry)
        counts = [count + one for count, one in zip(counts, more, strict=True)]
    yield stretch


def _limit(entry: Entry) -> int:
    return BUCKET_BYTES if entry.device.type == "cpu" else BUCKET_BYTES_ELSEWHERE


def _size(entry: Entry) -> int:
    """Return the bytes of the entry's weights on the rank that has most; the same on every rank."""
    ranks = prod(axis.size for axes in entry.layout.shard_axes for axis in axes)
    return -(-prod(entry.shape) // ranks) * entry.dtype.itemsize


def _kind(parameter: Tensor) -> tuple[Any, ...]:
    """Return all that the entry of a parameter depends on, beside its group, name and index."""
    return (parameter.shape, parameter.dtype, parameter.device, *(getattr(parameter, name, None) for name in PLACED))


def _refuse_untrainable(name: str, parameter: Tensor) -> None:
    if parameter.dtype not in TRAINABLE:
        raise ValueError(
            f"parameter {name!r} is {parameter.dtype}; only real floating-point parameters of 16 bits or more can be "
            f"trained: keep it in bfloat16 or freeze it, or leave its group out, as in Dion([group for group in "
            f"param_groups(model) if group['params'][0].dtype != {parameter.dtype}])"
        )
    if parameter.is_inference():
        raise ValueError(
            f"parameter {name!r} was made within torch.inference_mode(), so it cannot be written to outside: make or "
            f"load the model under torch.no_grad() instead, or clone its parameters outside of inference mode"
        )
    if any(length > 1 and not stride for length, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise ValueError(
            f"parameter {name!r} was expanded: several of its entries share one memory location, and no step can write "
            f"them; clone() the tensor before it becomes a parameter"
        )


def _entry(name: str, number: int, parameter: Tensor, group: dict[str, Any], replicas: Any) -> Entry:
    """Return the entry of a parameter as if it were the first of its group. Raises ValueError."""
    rule = group_rule(group)
    layout = read_layout(name, parameter, replicas, group["replica_sync"] != "none")
    if rule.rounding == "stochastic" and parameter.dtype == torch.float16:
        raise ValueError(
            f"parameter {name!r} is float16, and rounding='stochastic' is for bfloat16: make the weights bfloat16, or "
            f"leave rounding out"
        )
    matrices = None
    if rule.matrices:
        try:
            matrices = read_view(group["view"], layout.shape)
            parts_of(matrices, layout)
        except ValueError as error:
            raise ValueError(f"parameter {name!r} {error}") from None
    sizes = matrices.sizes if matrices else [layout.shape]
    try:
        slots = _longest([rule.slots(size, parameter.dtype) for size in sizes])
    except ValueError as error:
        raise ValueError(f"parameter {name!r} {error}") from None
    owners = layout.replicas if group["shard_state"] == "zero1" and rule.matrices else ()
    return Entry(
        name, number, 0, parameter.dtype, parameter.device, layout, matrices, tuple(slots.items()), options_of(group),
        owners, offload=offloads(group, parameter),
    )  # fmt: skip


def _longest(slots: Sequence[dict[str, Slot]]) -> dict[str, Slot]:
    """Return the slots of a parameter whose matrices have these slots: the same, with the longest of all lengths.
    Raises ValueError if they follow different sides; its message continues a sentence that starts with the name."""

    def longest(*dims: Any) -> Any:
        if len({dim for dim in dims if isinstance(dim, str)}) > 1:
            raise ValueError(
                "has blocks whose shorter sides differ, but their state is one tensor, which follows one side: choose "
                "q_side='rows' or q_side='columns'"
            )
        return dims[0] if isinstance(dims[0], str) else max(dims)

    def joined(name: str, slot: Slot) -> Slot:
        if slot.dims is None:
            return slot
        dims = zip(*((other[name].dims or ()) for other in slots), strict=True)
        return replace(slot, dims=tuple(longest(*lengths) for lengths in dims))

    return {name: joined(name, slot) for name, slot in slots[0].items()}


_OTHER_BITS = (
    "state {!r} of parameter {!r} is in 8 bits and the group's state_dtype is not 'int8', or the other way round: "
    "build the optimizer with the state_dtype that it was saved with, load it, and then call convert_state()"
)


def check_state(entry: Entry, held: Mapping[str, Any]) -> None:
    """Refuse state that is not this entry's: another optimizer's, another rank's, another model's. Further state that
    wrappers such as Lookahead keep is accepted."""
    slots = dict(entry.slots)
    # missing state in a flattened checkpoint becomes an empty dict
    missing = [key for key in slots if held and not isinstance(held.get(key), (Tensor, int, float))]
    for key in held:
        if missing and key not in slots:
            raise ValueError(
                f"parameter {entry.name!r} has state {key!r}, which its rule does not keep (it keeps "
                f"{', '.join(map(repr, slots))}): this state was saved by another optimizer or another rule"
            )
    if missing:
        raise ValueError(
            f"the state of parameter {entry.name!r} has no {' and no '.join(map(repr, missing))}: it is not complete. "
            f"If it was saved while the parameter was frozen, freeze it while loading, too; if an option was edited in "
            f"param_groups after the first step, undo that (convert_state() changes state_dtype)"
        )
    for key in slots if held else ():
        value, layout = held[key], entry.state_layout(slots[key])
        expected = layout.shape
        if torch.as_tensor(value).is_floating_point() != slots[key].dtype.is_floating_point:
            raise ValueError(_OTHER_BITS.format(key, entry.name))
        if tuple(torch.as_tensor(value).shape) != expected:
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} has shape {tuple(value.shape)} where {expected} is needed: "
                f"the model or the rank differs from that of the state; build the optimizer with the options it was "
                f"saved with, or undo the edit of param_groups if there was one"
            )
        if not layout.holds(value):
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} is placed as {value.placements} where {layout.placements} "
                f"is needed: redistribute it, or load it by torch.distributed.checkpoint"
            )
