"""Overrides of the roles that were found: ordered patterns, of which the first that matches a parameter applies.

    overrides = {"*.mlp.gate.weight": {"rule": "adamw"}, "*.embed_*": {"lr": 1e-3}, "*table": {"role": "embedding"}}

May import the standard library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Overrides = Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Override:
    """Group keys, and perhaps a ``role``, of parameters whose plain names match the pattern (``*``, ``?``, ``[]``)."""

    pattern: str
    settings: Mapping[str, Any]


def read_overrides(given: Overrides | None, roles: Sequence[str]) -> list[Override]:
    """Return the overrides in the given order. Raises TypeError or ValueError if one is no pattern with settings."""
    if given is None:
        return []
    read: list[Override] = []
    for item in list(given.items()) if isinstance(given, Mapping) else list(given):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"overrides has {item!r} where a pattern and its settings are needed: give a dict")
        pattern, settings = item
        if not isinstance(pattern, str) or not isinstance(settings, Mapping):
            raise TypeError(f"overrides[{pattern!r}] is no dict of group keys, such as {{'rule': 'adamw'}}")
        if settings.get("role", roles[0]) not in roles:
            raise ValueError(
                f"role {settings['role']!r} of overrides[{pattern!r}] is unknown; {', '.join(roles)} exist"
            )
        for key in ("params", "param_names", "reason"):
            if key in settings:
                raise ValueError(f"overrides[{pattern!r}] sets {key!r}, which the grouping itself fills; leave it out")
        read.append(Override(pattern, dict(settings)))
    return read


def choose(overrides: Sequence[Override], names: Sequence[str]) -> dict[str, Override]:
    """Return the override of each name that has one. Raises ValueError for a pattern that applies to no parameter."""
    chosen: dict[str, Override] = {}
    for name in names:
        for override in overrides:
            if fnmatchcase(name, override.pattern):
                chosen[name] = override
                break
    for override in overrides:
        if not any(found is override for found in chosen.values()):
            raise ValueError(_why_unused(override.pattern, names))
    return chosen


def _why_unused(pattern: str, names: Sequence[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return f"all that the pattern {pattern!r} matches is taken by patterns before it: put it first, or leave it out"
    plain = pattern.strip("*")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or list(names[:3])
    tails = {name for name in names if plain.rpartition(".")[2].strip("*?") and name.endswith(plain.rpartition(".")[2])}
    shown = list(dict.fromkeys([*near, *sorted(tails)[:2]]))
    return (
        f"the pattern {pattern!r} matches no parameter; near it are {', '.join(map(repr, shown))} "
        f"(a pattern has to match the whole name: '*' stands for any part of it)"
    )
