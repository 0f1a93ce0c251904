"""The table of a plan: one line a parameter, or one line for equal parameters of numbered layers.

    model.layers.{0..125}.self_attn.q_proj.weight    126 parameters that are alike in everything but their number

May import torch and ``orthoshard``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from orthoshard.plan import Entry, Plan

HEAD = ("parameter", "shape", "view", "role", "rule", "lr", "decay", "layout", "why")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def table(plan: Plan, groups: Sequence[dict[str, Any]], order: dict[str, int], every: bool) -> str:
    """``order``: the place of each name in the model. ``every``: a line for each parameter."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for entry in sorted(plan.entries, key=lambda entry: order[entry.name]):
        cells = _cells(entry, groups[entry.group])
        where = entry.name if every else NUMBER.sub("*", entry.name, count=1)
        lines.setdefault((where, *cells), []).append(entry.name)
    rows = [HEAD, *((_name(key[0], names), *key[1:]) for key, names in lines.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    )


def _cells(entry: Entry, group: dict[str, Any]) -> tuple[str, ...]:
    shape = "×".join(map(str, entry.shape)) or "()"
    view = entry.view.text if entry.view else "-"
    thin = dict(entry.slots).get("Q")
    rule = f"{group['rule']} r={entry.state_layout(thin).shape[-1]}" if thin else group["rule"]
    lr, decay = f"{float(group['lr']):.3g}", f"{float(group['weight_decay']):.3g}"
    return shape, view, group["role"] or "-", rule, lr, decay, str(entry.layout), group["reason"] or "-"


def _name(pattern: str, names: list[str]) -> str:
    """The names in one: numbers as ranges."""
    if len(names) == 1:
        return names[0]
    numbers = sorted(int(match[0]) for name in names if (match := NUMBER.search(name)))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    said = ",".join(f"{a}..{b}" if a != b else f"{a}" for a, b in spans)
    return pattern.replace("*", f"{{{said}}}", 1)
