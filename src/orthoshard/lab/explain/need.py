"""The rank fraction that captures a given share of the energy that the rule saw, from recorded spectra.

    c_j(f)     share of |X|² that the best rank-⌈f d⌉ matrix has, mean over the matrices of parameter j: its spectrum
    C(f)       mean of c_j over the matrices of several parameters and over the chosen steps
    need(t)    the least recorded f with C(f) >= t

All matrices have the same weight, because an orthonormal update moves every matrix by the same length, whatever the
size of its gradient. The result is a best case: a warm-started power iteration captures somewhat less (see
``captured``). Fractions are rounded up to those of `orthoshard.diagnostics.FRACTIONS`. The spectrum is that of the
momentum *as trained*: with error feedback, what a low rank leaves accumulates in it. May import ``orthoshard``.
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
    """The needs of several parameters together.

    Args:
        label: rule and view of the group, or the pattern of the parameters' names.
        inner: whether these parameters are a part of the last group before.
        matrices: number of matrices.
        fraction: rank fraction of the run; None for a rule of full rank.
        captured: mean share of the energy that the run captured; None for a rule of full rank.
        possible: share of the energy that the best matrix of that rank has; None for a rule of full rank.
        effective_rank: mean over the matrices.
        flatness: mean effective rank of what the run's rank left, as a share of the directions left; None at full rank.
        needs: rank fraction by target; None if the spectrum never reaches the target (rounding, at target 1).
        weakest: by target, the parameter with the least share at that fraction, and its share.
    """

    label: str
    inner: bool
    matrices: int
    fraction: float | None
    captured: float | None
    possible: float | None
    effective_rank: float
    flatness: float | None
    needs: dict[float, float | None]
    weakest: dict[float, tuple[str, float]]


def advise(folder: Path, targets: Sequence[float], first: int | None) -> tuple[list[Need], list[int]]:
    """Return the needs of every group, each followed by those of its patterns of names; and the steps of the means.

    These are the recorded steps from ``first`` on, or the later half for None. Raises ``UserError``.
    """
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
    """Return whether this parameter has a spectrum. It has none if its gradients were zero."""
    return shown["spectrum"] is not None and len(shown["spectrum"]) == len(FRACTIONS)


def _advise(
    folder: Path, events: Sequence[Mapping[str, Any]], targets: Sequence[float], first: int | None
) -> tuple[list[Need], list[int]]:
    if not events:
        raise UserError(
            f"the record of {folder} has no spectra; train, or resume the run, with --diagnostics 10 --spectra."
        )
    last = events[-1]["step"]
    chosen = [event for event in events if event["step"] >= (last / 2 if first is None else first)]
    if not chosen:
        raise UserError(f"--from-step {first} is after the last recorded spectra, which are of step {last}.")
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
    flatness: list[tuple[float, float]] = []
    for name in names:
        shown = [event["parameters"][name] for event in events if name in event["parameters"]]
        shown = [one for one in shown if _whole(one)]
        weights[name] = shown[-1]["matrices"]
        curves[name] = [_mean((one["spectrum"][k], 1.0) for one in shown) for k in range(len(FRACTIONS))]
        captured += [(one["captured"], weights[name]) for one in shown if one["captured"] is not None]
        effective += [(one["effective_rank"], weights[name]) for one in shown]
        flatness += [(one["tail_flatness"], weights[name]) for one in shown if one["tail_flatness"] is not None]
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
        flatness=_mean(flatness) if flatness else None,
        needs=needs,
        weakest=weakest,
    )


def _at(curve: Sequence[float], fraction: float) -> float:
    """Return the share at the largest recorded fraction up to ``fraction``, or at the first if all are larger."""
    return max((f, share) for f, share in zip(FRACTIONS, curve, strict=True) if f <= max(fraction, FRACTIONS[0]))[1]


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    pairs = list(weighted)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
