"""Groups and layouts to buckets: which parameters take one update together. Pure, frozen, printable.

Matrices of one group, shape, dtype and device are one bucket, so that the arithmetic of a step is batched and
their state is one allocation. Parameters of an elementwise rule are one bucket whatever their shapes.
May import `rules`, `groups`, `params` and `layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .groups import group_rule
from .layout import MatrixLayout, matrix_layout
from .params import refuse_flattened
from .rules import Rule, Slot


@dataclass(frozen=True)
class Entry:
    """One parameter in the plan: the ``index``-th of group ``group``. ``layout`` is None under elementwise rules."""

    name: str
    group: int
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: MatrixLayout | None
    slots: tuple[tuple[str, Slot], ...]

    @property
    def batch(self) -> int:
        """How many matrices it is."""
        return self.layout.batch if self.layout else 1

    def state_shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of a slot as the parameter's state holds it: the batch first, where the parameter has one."""
        if slot.dims is None:
            return self.shape
        if not slot.dims:
            return ()
        return (*self.shape[:-2], *self.matrix_shape(slot))

    def matrix_shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of a slot for one matrix of the parameter."""
        assert self.layout is not None
        assert slot.dims is not None
        lengths = {"rows": self.layout.rows, "columns": self.layout.columns}
        return tuple(lengths[dim] if isinstance(dim, str) else dim for dim in slot.dims)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group that take one update together."""

    group: int
    entries: tuple[Entry, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n) of its matrices; () under elementwise rules."""
        layout = self.entries[0].layout
        return (layout.rows, layout.columns) if layout else ()


@dataclass(frozen=True)
class Plan:
    """All buckets of an optimizer, in the order in which every rank works through them."""

    buckets: tuple[Bucket, ...]

    @property
    def entries(self) -> list[Entry]:
        """Every parameter, in the order of the groups."""
        return sorted((e for bucket in self.buckets for e in bucket.entries), key=lambda e: (e.group, e.index))


def build_plan(groups: Sequence[dict[str, Any]]) -> Plan:
    """The plan of groups whose keys are complete. Raises ValueError, naming the parameter, where its rule fits it not.

    Frozen parameters and parameters without an entry are no part of it.
    """
    buckets: dict[tuple[Any, ...], list[Entry]] = {}
    for number, group in enumerate(groups):
        rule = group_rule(group)
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            if not parameter.requires_grad or not parameter.numel():
                continue
            name = names[index] if names else f"group {number}, parameter {index}"
            entry = _entry(name, number, index, parameter, rule)
            shape = (entry.layout.rows, entry.layout.columns) if entry.layout else ()
            buckets.setdefault((number, shape, entry.dtype, entry.device), []).append(entry)
    return Plan(tuple(Bucket(key[0], tuple(entries)) for key, entries in buckets.items()))


def _entry(name: str, group: int, index: int, parameter: Tensor, rule: Rule) -> Entry:
    refuse_flattened(name, parameter)
    if not parameter.is_floating_point():
        raise ValueError(f"parameter {name!r} is {parameter.dtype}; only real floating-point parameters can be trained")
    layout = matrix_layout(name, parameter) if rule.matrices else None
    shape = (layout.rows, layout.columns) if layout else tuple(parameter.shape)
    slots = tuple(rule.slots(shape, parameter.dtype).items())
    return Entry(name, group, index, tuple(parameter.shape), parameter.dtype, parameter.device, layout, slots)


def check_state(entry: Entry, held: Mapping[str, Any]) -> None:
    """Refuse state that is not this entry's: another optimizer's, another rank's, another model's."""
    slots = dict(entry.slots)
    for key, value in held.items():
        if key not in slots:
            raise ValueError(
                f"parameter {entry.name!r} has state {key!r}, which its rule does not keep (it keeps "
                f"{', '.join(map(repr, slots))}): this state was saved by another optimizer or another rule"
            )
        expected = entry.state_shape(slots[key])
        if tuple(torch.as_tensor(value).shape) != expected:
            raise ValueError(
                f"state {key!r} of parameter {entry.name!r} has shape {tuple(value.shape)} where {expected} is needed: "
                f"the model or the rank differs from that of the state; build the optimizer with the options it was "
                f"saved with"
            )


def explain(plan: Plan, groups: Sequence[dict[str, Any]]) -> str:
    """One line a parameter: name, shape, role, rule, lr, decay, layout, and why."""
    head = ("parameter", "shape", "role", "rule", "lr", "decay", "layout", "why")
    rows: list[tuple[str, ...]] = [head]
    for entry in plan.entries:
        group = groups[entry.group]
        shape = "×".join(map(str, entry.shape)) or "()"
        thin = dict(entry.slots).get("Q")
        rule = f"{group['rule']} r={entry.matrix_shape(thin)[-1]}" if thin else group["rule"]
        where = str(entry.layout) if entry.layout else "whole"
        lr, decay = f"{float(group['lr']):.3g}", f"{float(group['weight_decay']):.3g}"
        rows.append((entry.name, shape, group["role"] or "-", rule, lr, decay, where, group["reason"] or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = ["  ".join([cell.ljust(w) for cell, w in zip(row, widths, strict=False)] + [row[-1]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
