"""Advice on the way from AdamW's settings to ours: the conventions side by side, what stays under AdamW, and code.

May import ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthoshard.grouping import Claim
from orthoshard.grouping.roles import MATRICES
from orthoshard.lab.explain.match import Matrices, common_lr, matched_decay, matched_lr, matrices_of
from orthoshard.lab.tables import aligned

CONVENTIONS = {
    "rms": "0.2·sqrt(max(m, n))",
    "spectral": "sqrt(m / n)",
    "original": "sqrt(max(1, m / n))",
}
# Roles that a usual AdamW setup decays: everything with two dimensions or more, but not vectors.
DECAYED = ("embedding", "position", "head", "router", "convolution", "other")
# Rows of the table of shapes; other shapes have few entries.
MOST_SHAPES = 8


@dataclass(frozen=True)
class Adamw:
    """Settings with which a model was trained."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]


@dataclass(frozen=True)
class Target:
    """The optimizer to change to. ``rank_fraction`` is None for the rule's default, or a rule without ranks."""

    optimizer: str
    scale: str
    rank_fraction: float | None = None

    @property
    def name(self) -> str:
        return {"dion": "Dion", "dion_tail": "DionTail", "muon": "Muon"}[self.optimizer]


def advise(model: str, claims: Sequence[Claim], adamw: Adamw, target: Target) -> str:
    """Return the whole text. Raises ValueError if the model has no matrices."""
    matrices = matrices_of([claim for claim in claims if claim.role in MATRICES])
    if not matrices:
        raise ValueError(f"{model} has no matrices: all its parameters would stay under AdamW")
    lr = common_lr(adamw.lr, target.scale, matrices)
    decay = matched_decay(adamw.lr, adamw.weight_decay, lr)
    return "\n".join(
        [
            f"From AdamW(lr={adamw.lr:g}, weight_decay={adamw.weight_decay:g}, betas={adamw.betas}) to "
            f"{target.name} on {model}",
            "",
            *_conventions(matrices, adamw, target),
            "",
            *_shapes(matrices, adamw),
            "",
            *_stays(claims, adamw),
            "",
            *_notes(target, adamw, lr, decay),
            "",
            code(adamw, target, lr, decay, {claim.role for claim in claims}),
        ]
    )


def _conventions(matrices: Sequence[Matrices], adamw: Adamw, target: Target) -> list[str]:
    """Return a line for each convention, with the lr and decay under which the whole update has AdamW's norm."""
    rows = [("scale", "factor of an (m, n) matrix", "lr", "weight_decay", "size of one update beside AdamW's")]
    for scale, formula in CONVENTIONS.items():
        lr = common_lr(adamw.lr, scale, matrices)
        ratios = [lr / matched_lr(adamw.lr, scale, each.m, each.n) if adamw.lr else 1.0 for each in matrices]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} times"
        chosen = " <- chosen" if scale == target.scale else ""
        decay = matched_decay(adamw.lr, adamw.weight_decay, lr)
        rows.append((scale, formula, f"{lr:.3g}", f"{decay:.3g}", f"{spread}{chosen}"))
    return ["Matrices: learning rates that match AdamW under each convention", *_aligned(rows)]


def _shapes(matrices: Sequence[Matrices], adamw: Adamw) -> list[str]:
    head = ("matrices", "m×n (out, in)", "share", *(f"lr under {scale}" for scale in CONVENTIONS))
    total = sum(each.entries for each in matrices)
    rows: list[tuple[str, ...]] = [head]
    for each in matrices[:MOST_SHAPES]:
        rates = (f"{matched_lr(adamw.lr, scale, each.m, each.n):.3g}" for scale in CONVENTIONS)
        rows.append((f"{each.count}", f"{each.m}×{each.n}", f"{each.entries / total:.1%}", *rates))
    rest = len(matrices) - MOST_SHAPES
    more = [f"  and {rest} more shapes"] if rest > 0 else []
    return ["The learning rate that matches AdamW for each shape alone", *_aligned(rows), *more]


def _stays(claims: Sequence[Claim], adamw: Adamw) -> list[str]:
    reasons: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        if claim.role not in MATRICES:
            reasons.setdefault((claim.role, claim.reason), []).append(claim)
    if not reasons:
        return ["Nothing stays under AdamW."]
    rows = [("role", "parameters", "entries", "decay", "why")]
    for (role, why), members in reasons.items():
        entries = sum(claim.parameter.numel() for claim in members)
        decay = adamw.weight_decay if role in DECAYED else 0.0
        rows.append((role, str(len(members)), f"{entries:,}", f"{decay:g}", why))
    return [f"Stays under AdamW, at lr {adamw.lr:g} as before", *_aligned(rows)]


def _notes(target: Target, adamw: Adamw, lr: float, decay: float) -> list[str]:
    lines = [
        f"Weights shrink by lr·weight_decay per step: {adamw.lr:g}·{adamw.weight_decay:g} = {lr:.3g}·{decay:.3g}. If "
        f"you change lr, change weight_decay so that the product stays the same.",
        "Keep schedule, warm-up, clipping and batch as they are. Then try half and twice this lr.",
    ]
    if target.optimizer == "dion":
        lines.append(
            "Dion's update has r singular values of 1 instead of min(m, n), so its norm is sqrt(f) times as large at "
            "rank fraction f. The rates above match singular values, which lr sets at any rank."
        )
    return lines


def code(adamw: Adamw, target: Target, lr: float, decay: float, roles: set[str]) -> str:
    """Return Python code that builds the optimizer of ``model``."""
    options = [f'scale="{target.scale}",', f"weight_decay={decay:.4g},"]
    if target.rank_fraction is not None:
        options.append(f"rank_fraction={target.rank_fraction:g},")
    decayed = tuple(role for role in DECAYED if role in roles)
    lines = [
        f"from orthoshard import {target.name}, param_groups",
        "",
        "groups = param_groups(",
        "    model,",
        f'    matrix="{target.optimizer}",',
        f"    lr={lr:.4g},",
        f"    scalar_lr={adamw.lr:g},",
        f"    scalar_betas={adamw.betas},",
        *(f"    {option}" for option in options),
        ")",
    ]
    if decayed and adamw.weight_decay:
        lines += [
            "for group in groups:",
            f'    if group["role"] in [{_quoted(decayed)}]:',
            f'        group["weight_decay"] = {adamw.weight_decay:g}',
        ]
    return "\n".join([*lines, f"optimizer = {target.name}(groups, lr={lr:.4g})"])


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows)]
