"""Which rank fraction captures so much of the energy that the rule saw, from recorded spectra.

    c_j(f)     share of |X|² that the best rank-⌈f d⌉ matrix has, mean over the matrices of parameter j: its spectrum
    C(f)       mean of c_j over the matrices of several parameters and over the steps taken into account
    need(t)    the least recorded f with C(f) >= t

Every matrix counts alike, because an orthonormal update moves every matrix alike, whatever the size of its gradient.
What is read off is a best case: a warm-started power iteration captures somewhat less (``captured`` beside it), the
fractions are those of `orthoshard.diagnostics.FRACTIONS`, rounded up, and the spectrum is that of the momentum *as
trained*: with error feedback, what a low rank leaves piles up in it. May import ``orthoshard``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthoshard.diagnostics import FRACTIONS
from orthoshard.lab.train import record
from orthoshard.lab.train.errors import UserError

Shown = Mapping[str, Any]  # one parameter at one step, as `orthoshard.lab.train.figures` records it


@dataclass(frozen=True)
class Need:
    """Of several parameters together.

    label     the group's rule and view, or the pattern of the parameters' names
    inner     whether it is a part of the group before it
    matrices  how many
    fraction  rank fraction of the run; None under a rule of full rank
    captured  what the run's rank did capture, mean; None under a rule of full rank
    possible  what the best matrix of that rank would have
    effective_rank  mean
    needs     rank fraction by target; None where a spectrum never gets there (rounding, at target 1)
    weakest   by target, the parameter that has least at that fraction, and what it has
    """

    label: str
    inner: bool
    matrices: int
    fraction: float | None
    captured: float | None
    possible: float | None
    effective_rank: float
    needs: dict[float, float | None]
    weakest: dict[float, tuple[str, float]]


def advise(folder: Path, targets: Sequence[float], first: int | None) -> tuple[list[Need], list[int]]:
    """The needs of every group, each followed by those of its parameters' patterns; and the steps they are means over:
    those from ``first`` on, by default the later half. Raises ``UserError``."""
    if not (folder / record.NAME).is_file():
        raise UserError(f"there is no run in {folder}; give the folder of one, such as runs/shakespeare-dion-001.")
    try:
        events = [event for event in record.read(folder) if event["kind"] == "diagnostics"]
        events = [event for event in events if any(_whole(shown) for shown in event["parameters"].values())]
        return _advise(folder, events, targets, first)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the diagnostics in {folder / record.NAME} cannot be read ({type(error).__name__}: {error}); the file was "
            "edited, or written by another version."
        ) from error


def _whole(shown: Shown) -> bool:
    """Whether this parameter has a spectrum; it has none where its gradients were zero."""
    return shown["spectrum"] is not None and len(shown["spectrum"]) == len(FRACTIONS)


def _advise(
    folder: Path, events: Sequence[Mapping[str, Any]], targets: Sequence[float], first: int | None
) -> tuple[list[Need], list[int]]:
    if not events:
        raise UserError(
            f"the record of {folder} has no spectra; train with --diagnostics 10 --spectra, or resume the run so."
        )
    last = events[-1]["step"]
    chosen = [event for event in events if event["step"] >= (last / 2 if first is None else first)]
    if not chosen:
        raise UserError(f"--from-step {first} is behind the last recorded spectra, those of step {last}.")
    needs = list(_needs(chosen, targets))
    if not needs:
        raise KeyError("no parameter belongs to a group")
    return needs, [event["step"] for event in chosen]


def _needs(events: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> Iterable[Need]:
    for number, group in enumerate(events[-1]["groups"]):
        every = [item for event in events for item in event["parameters"].items()]
        mine = dict.fromkeys(name for name, shown in every if shown["group"] == number and _whole(shown))
        if not mine:
            continue
        label = group["rule"] if group["view"] == "whole" else f"{group['rule']}, view {group['view']}"
        yield _need(f"{label}, {group['role']}", False, group["rank_fraction"], list(mine), events, targets)
        patterns: dict[str, list[str]] = {}
        for name in mine:
            patterns.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
        if len(patterns) > 1:
            for pattern, names in patterns.items():
                yield _need(pattern, True, group["rank_fraction"], names, events, targets)


def _need(
    label: str,
    inner: bool,
    fraction: float | None,
    names: Sequence[str],
    events: Sequence[Mapping[str, Any]],
    targets: Sequence[float],
) -> Need:
    curves: dict[str, list[float]] = {}
    weights: dict[str, float] = {}
    captured: list[tuple[float, float]] = []
    effective: list[tuple[float, float]] = []
    for name in names:
        shown = [event["parameters"][name] for event in events if name in event["parameters"]]
        shown = [one for one in shown if _whole(one)]
        weights[name] = shown[-1]["matrices"]
        curves[name] = [_mean((one["spectrum"][k], 1.0) for one in shown) for k in range(len(FRACTIONS))]
        captured += [(one["captured"], weights[name]) for one in shown if one["captured"] is not None]
        effective += [(one["effective_rank"], weights[name]) for one in shown]
    whole = [_mean((curves[name][k], weights[name]) for name in curves) for k in range(len(FRACTIONS))]
    needs = {t: next((f for f, share in zip(FRACTIONS, whole, strict=True) if share >= t), None) for t in targets}
    weakest: dict[float, tuple[str, float]] = {}
    for target, need in needs.items():
        if need is not None:
            at = FRACTIONS.index(need)
            name = min(curves, key=lambda name: curves[name][at])
            weakest[target] = name, curves[name][at]
    return Need(
        label=label,
        inner=inner,
        matrices=round(sum(weights.values())),
        fraction=fraction,
        captured=_mean(captured) if captured else None,
        possible=_at(whole, fraction) if fraction is not None else None,
        effective_rank=_mean(effective),
        needs=needs,
        weakest=weakest,
    )


def _at(curve: Sequence[float], fraction: float) -> float:
    """Of the nearest recorded fraction that is no larger; of the first where all are larger."""
    return max((f, share) for f, share in zip(FRACTIONS, curve, strict=True) if f <= max(fraction, FRACTIONS[0]))[1]


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    pairs = list(weighted)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
