"""The text that `explain` prints for a plan: what happens to each parameter, and how its matrices travel.

Lines that would be alike are merged: parameters whose names differ only in numbers, and updates that differ only in
their counts.

    model.layers.{0..125}.self_attn.q_proj.weight    126 parameters, alike in every column of the table
    512 2048×7168 in 8 updates under dion            from several buckets, or slices of one parameter

May import `groups`, `layout`, `plan`, `budget` and `engine.dryrun`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

from .budget import update_dry
from .engine.dryrun import Dry
from .groups import COMMON, group_rule, plain, rule_class
from .layout import Replicas
from .plan import Entry, Plan

HEAD = ("parameter", "shape", "role", "rule", "lr", "decay", "layout", "why")
NUMBER = re.compile(r"(?<![^\s.])(?:0|[1-9]\d*)(?![^\s.])")
# What replicas do, in words.
WORDS: dict[Replicas, str] = {
    "split": "shared out over",
    "repeat": "repeated at",
    "average": "factors averaged over",
    "average_bfloat16": "factors averaged in bfloat16 over",
    "own": "published by owners over",
}


class Shown(str):
    """A string that an interactive session shows as `print` would: without quotes, with line breaks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain_parameters(
    plan: Plan, groups: Sequence[dict[str, Any]], every: bool = False, order: Mapping[str, int] | None = None
) -> str:
    """Return a table with name, shape, role, rule, lr, decay, layout, and why.

    Args:
        every: print a line for each parameter, even if they are alike.
        order: the position of each name in the table; by default, the order of the groups.
    """
    lines: dict[tuple[str, ...], list[str]] = {}
    for entry in sorted(plan.entries, key=lambda e: (order[e.name] if order else 0, e.group, e.index)):
        cells = _cells(entry, groups[entry.group])
        key = (entry.name if every else NUMBER.sub("{}", entry.name), *cells)
        lines.setdefault(key, []).append(entry.name)
    rows = [HEAD, *((name, *key[1:]) for key, names in lines.items() for name in _folded(names))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    )


def described(name: str, groups: Sequence[dict[str, Any]]) -> str:
    """Return the ``repr`` of an optimizer: a line for all groups with equal options."""
    alike: dict[str, tuple[list[str], list[int]]] = {}
    for group in groups:
        read = {**COMMON, **rule_class(group).options()}
        told = {key: plain(group[key]) for key in read if key not in ("rule", "role", "reason", "lr", "rounding_steps")}
        other = [f"{key}={value}" for key, value in told.items() if value != read[key]]
        options = ", ".join([f"lr={float(group['lr']):.3g}", *other])
        roles, counts = alike.setdefault(f"{group['rule']}({options})", ([], []))
        roles.append(group["role"] or "parameters")
        counts.append(len(group["params"]))
    lines = (f"  {sum(counts)} × {', '.join(dict.fromkeys(roles))}: {told}" for told, (roles, counts) in alike.items())
    return "\n".join([f"{name}(", *lines, ")"])


def explain_updates(plan: Plan, groups: Sequence[dict[str, Any]], every: bool = False) -> str:
    """Return a line for all updates of matrices of one size that travel alike, or a line for each update if ``every``.
    A line tells how many matrices there are, how they travel, and what their step costs this rank."""
    lines: dict[tuple[Any, ...], list[tuple[int, Dry]]] = {}
    for bucket in plan.buckets:
        group = groups[bucket.group]
        for update in bucket.updates:
            ways = [f"gradients averaged over {axis}" for axis in update.part.unreduced_axes if bucket.averaged]
            ways += ["whole matrices at owners"] if update.dealt else []
            ways += [f"{WORDS[update.replicas]} {axis}" for axis in update.part.replicas]
            key = (update.part.matrix, group["rule"], tuple(ways), update.part.over("both"), len(lines) if every else 0)
            dry = update_dry(bucket, update, group_rule(group))
            lines.setdefault(key, []).append((update.matrices, dry))
    return "\n".join(_line(matrix, rule, ways, found) for (matrix, rule, ways, *_), found in lines.items())


def _line(matrix: tuple[int, int], rule: str, ways: Iterable[str], found: Sequence[tuple[int, Dry]]) -> str:
    dries = [dry for _, dry in found]
    whole = Dry(flops=tuple(chain(*(dry.flops for dry in dries))), sent=tuple(chain(*(dry.sent for dry in dries))))
    ways = [*ways, *(f"{_bytes(sent)} over {axis} in {calls} calls" for axis, (sent, calls) in whole.by_axis().items())]
    many = f" in {len(found)} updates" if len(found) > 1 else ""
    return (
        f"{sum(count for count, _ in found)} {matrix[0]}×{matrix[1]}{many} under {rule}: "
        f"{'; '.join(ways) or 'nothing travels'}; {whole.total_flops / 1e9:.3g} GFLOP, {_bytes(whole.wire)} sent"
    )


def _bytes(count: Fraction) -> str:
    return f"{float(count) / 1e6:.3g} MB"


def _cells(entry: Entry, group: dict[str, Any]) -> tuple[str, ...]:
    shape = "×".join(map(str, entry.shape)) or "()"
    if entry.view and entry.view.text != "whole":
        shape = f"{shape} as {entry.view.text}"
    thin = dict(entry.slots).get("Q")
    rule = f"{group['rule']} r={entry.state_layout(thin).shape[-1]}" if thin else group["rule"]
    lr, decay = f"{float(group['lr']):.3g}", f"{float(group['weight_decay']):.3g}"
    return shape, group["role"] or "-", rule, lr, decay, str(entry.layout), group["reason"] or "-"


def _folded(names: Sequence[str]) -> list[str]:
    """Fold names that differ only in numbers into as few as possible: ``layers.{0..2}.experts.{0..7}.up``."""
    lines = [tuple((int(number),) for number in NUMBER.findall(name)) for name in names]
    for i in reversed(range(len(lines[0]))):
        alike: dict[Any, list[int]] = {}
        for line in lines:
            alike.setdefault((line[:i], line[i + 1 :]), []).extend(line[i])
        lines = [(*before, tuple(sorted(numbers)), *after) for (before, after), numbers in alike.items()]
    pattern = NUMBER.split(names[0])
    return ["".join(chain(*zip(pattern, map(_span, line), strict=False), pattern[-1:])) for line in lines]


def _span(numbers: Sequence[int]) -> str:
    """Write 0, 1, 2, 5 as {0..2,5}, and a single number as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(f"{a}..{b}" if a != b else f"{a}" for a, b in spans) + "}"
