"""How the weights of an update are rounded, by their group: to nearest, which is torch's way, or stochastically.

The random bits of an entry follow from its place in the whole parameter, which its layout knows, so that they are the
same on every layout. A step is identified by the group's own count, which is saved with it. May import torch, `rule`,
`plan`, `parts`, `linalg` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..linalg.host_sync import filled
from ..linalg.rounding import Rounding, Stochastic, places
from ..parts import Part
from ..plan import Entry
from ..rule import Rule
from .storage import parameter_seed


def roundings(
    rule: Rule, group: dict[str, Any], entries: Sequence[Entry], part: Part | None = None
) -> list[Rounding] | None:
    """Return one rounding for each tensor that the rule writes: the entries' local pieces, or what ``part`` takes of
    them. None: to nearest, as for everything that is not bfloat16."""
    if rule.rounding == "nearest" or entries[0].dtype != torch.bfloat16:
        return None
    alike: dict[Any, list[Entry]] = {}
    for entry in entries:
        alike.setdefault((entry.layout.shape, entry.layout.local_slices), []).append(entry)
    found: dict[str, Rounding] = {}
    for (shape, stretches), members in alike.items():
        keys = _keys(group["seed"], tuple(entry.name for entry in members), members[0].device)
        rows, columns = places(shape, stretches, keys, group["rounding_steps"])
        for entry, r, c in zip(members, rows, columns, strict=True):
            if part:
                r, c = part.view_of(entry.stack(r)), part.view_of(entry.stack(c))
            found[entry.name] = Stochastic(r, c)
    return [found[entry.name] for entry in entries]


def count_rounding(groups: Sequence[dict[str, Any]], skipped: Tensor | None = None) -> None:
    """Count one more step of the groups that round stochastically, unless it was ``skipped``, as only the device may
    know."""
    for group in groups:
        if group.get("rounding") == "stochastic":
            group["rounding_steps"] += 1 if skipped is None else torch.logical_not(skipped)


def _keys(seed: int, names: tuple[str, ...], device: torch.device) -> Tensor:
    """Return one key per parameter, int64. A captured step has its own, in memory of its graph: those in the cache may
    be dropped before the graph is."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return filled([_key(seed, name) for name in names], device)
    return _sent(seed, names, device)


@lru_cache(maxsize=1024)
def _sent(seed: int, names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([_key(seed, name) for name in names], dtype=torch.int64, device=device)


def _key(seed: int, name: str) -> int:
    return parameter_seed(seed, f"rounding/{name}")
