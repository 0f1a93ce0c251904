"""The input and output of every kind of figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.train.errors import UserError


@dataclass(frozen=True)
class Drawn:
    """A drawn figure. ``data`` and ``svg`` become files; ``table`` is Markdown, or empty."""

    data: dict[str, Any]
    svg: str
    caption: str
    table: str | None = None


Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of figure. ``options`` are the keys that its figures may have in a study."""

    draw: Callable[[Sequence[Results], Options], Drawn]
    options: frozenset[str]


@dataclass(frozen=True)
class Point:
    """A mean over seeds, and half the range; None for one seed."""

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Point:
        spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))


def labels(given: Sequence[Results]) -> list[str]:
    """Return the labels of all rivals that appear, in order."""
    return list(dict.fromkeys(row.label for results in given for row in results.rows))


def word(options: Options, key: str, default: str, known: Sequence[str]) -> str:
    """Return an option that must be one of a few words. Raises ``UserError``."""
    value = options.get(key, default)
    if value not in known:
        raise UserError(f"{key} = {value!r}; give one of {', '.join(known)}.")
    return str(value)


def seeds(given: Sequence[Results]) -> str:
    """Return how many seeds the means at the best learning rates are over, as words for a caption."""
    counts = {row.seeds for results in given for row in results.rows if row.seeds}
    if not counts or counts == {1}:
        return "one seed"
    low, high = min(counts), max(counts)
    return f"means over {low if low == high else f'{low} to {high}'} seeds, with half their range"
