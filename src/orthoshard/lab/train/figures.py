"""The diagnostics of a recorded step as an event: the figures of `RuleOptimizer.diagnostics`, by parameter.

    {"kind": "diagnostics", "step", "groups": [{"rule", "role", "view", "rank_fraction"}, ...],
     "parameters": {name: {"group", "matrices", "rank", "live", "captured", "effective_rank", "tail_flatness",
                           "orthogonality", "basis", "update_rms", "spectrum"}}}

``groups`` are the parameter groups with matrices; ``group`` is an index into them. Numbers are rounded to six digits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from orthoshard import RuleOptimizer
from orthoshard.lab.train.record import Event
from orthoshard.rules import RULES


def diagnostics_event(optimizer: RuleOptimizer, step: int) -> Event:
    """Return the event for the last step that recorded diagnostics; ``step`` is its number."""
    found = optimizer.diagnostics()
    groups: list[dict[str, Any]] = []
    parameters: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        members = [name for name in group.get("param_names", ()) if name in found]
        for name in members:
            figures = {key: _short(value) for key, value in dataclasses.asdict(found[name]).items()}
            parameters[name] = {"group": len(groups), **figures}
        if members:
            ranked = "rank_fraction" in RULES[group["rule"]].options()
            described = {key: group[key] for key in ("rule", "role", "view")}
            groups.append(described | {"rank_fraction": group["rank_fraction"] if ranked else None})
    return {"kind": "diagnostics", "step": step, "groups": groups, "parameters": parameters}


def _short(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
