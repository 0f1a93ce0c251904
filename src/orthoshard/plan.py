"""Groups and layouts to buckets: which parameters take one update together. Pure, frozen, printable.

Matrices of one group, shape, layout, dtype and device are one bucket, up to a size, so that the arithmetic of a step
is batched and their state is one allocation. Parameters of an elementwise rule are one bucket whatever their shapes.
May import `rules`, `groups`, `params`, `layout` and `cost`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .cost import worth_sharing
from .groups import group_rule
from .layout import Axis, Layout, read_layout
from .params import refuse_flattened
from .rules import Rule, Slot

# Matrices of one bucket on one rank. Large enough that a batch fills any device, small enough that several buckets
# are in flight and that a step's temporaries (Muon's: four times a bucket) stay small beside the model.
BUCKET_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Entry:
    """One parameter in the plan: the ``index``-th of group ``group``."""

    name: str
    group: int
    index: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    matrices: bool  # whether its rule treats it as matrices, or entry by entry
    slots: tuple[tuple[str, Slot], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def state_layout(self, slot: Slot) -> Layout:
        """How a slot is cut: as the dimensions of the parameter that it follows."""
        if slot.dims is None:
            return self.layout
        if not slot.dims:
            return Layout((), ())
        rows = len(self.shape) - 2
        ahead = [(dim, self.shape[dim]) for dim in range(rows)]  # the batch, where the parameter has one
        named = {"rows": (rows, self.shape[rows]), "columns": (rows + 1, self.shape[rows + 1])}
        dims = [*ahead, *(named[dim] if isinstance(dim, str) else (None, dim) for dim in slot.dims)]
        return self.layout.derive([dim for dim, _ in dims], tuple(length for _, length in dims))

    @property
    def signature(self) -> str:
        """What must be equal on every rank that shares the parameter."""
        return f"{self.name} {self.shape} {self.dtype} {self.layout} {self.matrices} {self.slots}"


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group that take one update together.

    ``dealt`` counts the matrices, here or elsewhere, of the buckets before it on the same mesh: work that is dealt out
    to ranks goes on where the last bucket's stopped, so that no rank gets every remainder. ``share``: replicas share
    out its work and send each other the results; else each does all of it.
    """

    group: int
    entries: tuple[Entry, ...]
    dealt: int
    share: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n) of its whole matrices; () under elementwise rules."""
        return self.entries[0].layout.matrix if self.entries[0].matrices else ()


@dataclass(frozen=True)
class Plan:
    """All buckets of an optimizer, in the order in which every rank works through them."""

    buckets: tuple[Bucket, ...]

    @property
    def entries(self) -> list[Entry]:
        """Every parameter, in the order of the buckets."""
        return [entry for bucket in self.buckets for entry in bucket.entries]

    def meshes(self) -> list[tuple[tuple[Axis, ...], list[int]]]:
        """Each set of axes that holds parameters, with the numbers of these parameters in `entries`."""
        found: dict[tuple[Axis, ...], list[int]] = {}
        for number, entry in enumerate(self.entries):
            axes = tuple(sorted(entry.layout.axes, key=lambda axis: axis.key))
            if axes:
                found.setdefault(axes, []).append(number)
        return list(found.items())


def build_plan(groups: Sequence[dict[str, Any]], replicas: Any = None, first: int = 0) -> Plan:
    """The plan of groups whose keys are complete. Raises ValueError, naming the parameter, where its rule fits it not.

    Frozen parameters and parameters without an entry are no part of it. ``replicas`` is the process group over which
    plain tensors are replicated, ``first`` the number of the first group.
    """
    buckets: dict[tuple[Any, ...], list[Entry]] = {}
    for number, group in enumerate(groups, first):
        rule = group_rule(group)
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            if not parameter.requires_grad or not parameter.numel():
                continue
            name = names[index] if names else f"group {number}, parameter {index}"
            entry = _entry(name, number, index, parameter, rule, read_layout(name, parameter, replicas))
            kind = entry.layout.kind if entry.matrices else ()
            buckets.setdefault((number, kind, entry.dtype, entry.device), []).append(entry)
    dealt, planned = Counter[tuple[Any, ...]](), list[Bucket]()
    for key, entries in buckets.items():
        for part in _parts(entries) if entries[0].matrices else [entries]:
            mesh = tuple(sorted(axis.key for axis in part[0].layout.axes))
            share = _shares(groups[part[0].group - first], part[0])
            planned.append(Bucket(key[0], tuple(part), dealt[mesh], share))
            dealt[mesh] += sum(prod(entry.shape[:-2]) for entry in part if entry.matrices)
    return Plan(tuple(planned))


def _shares(group: dict[str, Any], entry: Entry) -> bool:
    """Whether replicas share out the work on such parameters: as the group says, or else as is cheaper."""
    if not entry.matrices or not entry.layout.replicas:
        return False
    if group["replica_work"] != "auto":
        return group["replica_work"] == "share"
    demand = group_rule(group).demand(entry.layout.matrix, entry.dtype)
    return worth_sharing(demand, entry.layout, entry.device.type)


def _parts(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries in their order, in stretches of at most `BUCKET_BYTES` of weights; the same stretches on every rank."""
    part, size = list[Entry](), 0
    for entry in entries:
        share = -(-prod(entry.shape) // prod(axis.size for axes in entry.layout.cuts for axis in axes))
        if part and size + share * entry.dtype.itemsize > BUCKET_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += share * entry.dtype.itemsize
    yield part


def _entry(name: str, group: int, index: int, parameter: Tensor, rule: Rule, layout: Layout) -> Entry:
    refuse_flattened(name, parameter)
    if not parameter.is_floating_point():
        raise ValueError(f"parameter {name!r} is {parameter.dtype}; only real floating-point parameters can be trained")
    if rule.matrices and parameter.ndim not in (2, 3):
        raise ValueError(
            f"parameter {name!r} has shape {tuple(parameter.shape)}, which is no matrix. Pass the model itself, so "
            f"that groups are made for you (Dion(model)), or put it in a group of its own with rule='adamw'"
        )
    shape = layout.matrix if rule.matrices else layout.shape
    slots = tuple(rule.slots(shape, parameter.dtype).items())
    return Entry(name, group, index, parameter.dtype, parameter.device, layout, rule.matrices, slots)


def check_state(entry: Entry, held: Mapping[str, Any]) -> None:
    """Refuse state that is not this entry's: another optimizer's, another rank's, another model's."""
    slots = dict(entry.slots)
    for key, value in held.items():
        if key not in slots:
            raise ValueError(
                f"parameter {entry.name!r} has state {key!r}, which its rule does not keep (it keeps "
                f"{', '.join(map(repr, slots))}): this state was saved by another optimizer or another rule"
            )
        layout = entry.state_layout(slots[key])
        expected = layout.shape
        if tuple(torch.as_tensor(value).shape) != expected:
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} has shape {tuple(value.shape)} where {expected} is needed: "
                f"the model or the rank differs from that of the state; build the optimizer with the options it was "
                f"saved with"
            )
        if not layout.holds(value):
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} is placed as {value.placements} where {layout.placements} "
                f"is needed: redistribute it, or load it by torch.distributed.checkpoint"
            )
    missing = [key for key in slots if held and key not in held]
    if missing:
        raise ValueError(f"parameter {entry.name!r} has state {list(held)} but no {missing[0]!r}: it is not complete")


def explain(plan: Plan, groups: Sequence[dict[str, Any]]) -> str:
    """One line a parameter: name, shape, role, rule, lr, decay, layout, and why."""
    head = ("parameter", "shape", "role", "rule", "lr", "decay", "layout", "why")
    rows: list[tuple[str, ...]] = [head]
    for entry in sorted(plan.entries, key=lambda e: (e.group, e.index)):
        group = groups[entry.group]
        shape = "×".join(map(str, entry.shape)) or "()"
        thin = dict(entry.slots).get("Q")
        rule = f"{group['rule']} r={entry.state_layout(thin).shape[-1]}" if thin else group["rule"]
        lr, decay = f"{float(group['lr']):.3g}", f"{float(group['weight_decay']):.3g}"
        rows.append(
            (entry.name, shape, group["role"] or "-", rule, lr, decay, str(entry.layout), group["reason"] or "-")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = ["  ".join([cell.ljust(w) for cell, w in zip(row, widths, strict=False)] + [row[-1]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
