"""`tail_variant`: DionTail with every choice open, written plainly, for the ablations of docs/dion_tail.md.

    B = mu B + G   (or B = B + G under error feedback);   N = G + mu B (Nesterov) or B
    X = N or Nᵀ;   P = orthonormal(X Q), R = Xᵀ P, `iterations` times with Q = R in between
        `sketch`: before that, one iteration on every other column of N alone, at half the price
    `share = "energy"`: of 2 r columns for each matrix of a bucket, those whose |R_j|² / |N|² is largest among all of
        its matrices are used, r a matrix on the average; Q follows all 2 r, so that a rank can grow again
    V = orthonormal(R), or R / (column norms of R) under `right = "columns"`, the first form
    next Q = V, or, under `follow = "momentum"`, B P with unit columns: the part of N that the next step sees again
    E = X - P Rᵀ, T = E normalized as `tail` says, |T|_F² = d - r: by rows, columns, both in turn, as a whole, by sign;
        `completion`: row i as long as it would be in an orthonormal completion of rows, |T_i|² ~ d / m - |V_i|²;
        `running`: row i over the root of a running mean of |E_i|² (NorMuon's second moment, on the tail)
    U = P Vᵀ + c T; under `even`, its rows over the root of a running mean of their squares, at U's size (NorMuon)
    W = (1 - lr wd) W - lr s U;   B = B - (1 - mu) P Rᵀ under error feedback

One process only. A plugin: `orthoshard compare --optimizers ablations.toml`, whose rivals name this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from orthoshard.linalg.accumulate import accumulate, add_scaled
from orthoshard.linalg.orthonormal import householder
from orthoshard.rules import Batch, Rule, Slot, register
from orthoshard.rules.demand import Demand
from orthoshard.rules.request import Update
from orthoshard.rules.rule import SCALES, one_of

TAILS = ("none", "rows", "columns", "both", "frobenius", "sign", "completion", "running")
BETA2 = 0.95  # NorMuon's (arXiv 2510.05491)


@register
@dataclass(frozen=True)
class TailVariant(Rule):
    """The letters of the formula above; ``rank_fraction`` 0 is the tail alone."""

    name: ClassVar[str] = "tail_variant"
    matrices: ClassVar[bool] = True

    lr: float | Tensor = 0.01
    weight_decay: float | Tensor = 0.01
    momentum: float = 0.95
    nesterov: bool = True
    error_feedback: bool = False
    rank_fraction: float = 0.25
    iterations: int = 1
    sketch: bool = False
    share: Literal["even", "energy"] = "even"
    right: Literal["columns", "qr"] = "qr"
    follow: Literal["direction", "momentum"] = "direction"
    tail: str = "rows"
    tail_weight: float = 1.0
    even: bool = False
    q_side: Literal["rows", "columns"] = "rows"
    scale: str = "spectral"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("tail", self.tail, TAILS)
        one_of("right", self.right, ("columns", "qr"))
        one_of("share", self.share, ("even", "energy"))
        one_of("follow", self.follow, ("direction", "momentum"))
        one_of("scale", self.scale, list(SCALES))

    def rank(self, m: int, n: int) -> int:
        return math.ceil(self.rank_fraction * min(m, n))

    def _followed(self, m: int, n: int) -> int:
        """The columns of Q."""
        return min(self.rank(m, n) * (2 if self.share == "energy" else 1), m, n)

    def slots(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Slot]:
        momentum = {"momentum": Slot(("rows", "columns"), torch.float32)}
        if self.tail == "running" or self.even:
            momentum["squares"] = Slot(("rows", 1), torch.float32)
        r = self._followed(*shape)
        return momentum | ({"Q": Slot((self.q_side, r), torch.float32, fill="normal")} if r else {})

    def demand(self, shape: tuple[int, ...], dtype: torch.dtype) -> Demand:
        return Demand()

    def update(self, batch: Batch) -> Update:
        B, (m, n), d = batch.state["momentum"], batch.shape, min(batch.shape)
        decay = 1.0 if self.error_feedback else self.momentum
        accumulate(B, batch.gradients, decay)
        N = B
        if self.nesterov:
            N = torch.stack([g.float() for block in batch.gradients for g in block]) + self.momentum * B
        X = N.mT if self.q_side == "rows" else N
        r, captured, V = self.rank(m, n), torch.zeros_like(X), torch.zeros_like(X)
        ranks = torch.full((len(B), 1, 1), r)
        if r:
            Q = batch.state["Q"]
            right = Q
            if self.sketch:
                half = X[:, ::2]
                right = half.mT @ householder(half @ right)
            for _ in range(self.iterations):
                P = householder(X @ right)
                R = X.mT @ P
                right = R
            factor = householder(R) if self.right == "qr" else torch.nn.functional.normalize(R, dim=1)
            used = factor
            if self.share == "energy":
                live = _richest(R, N, r)
                R, ranks = R * live, live.sum((1, 2), keepdim=True)
                used = householder(R)
            captured = P @ R.mT
            V = P @ used.mT
            kept = (B if self.q_side == "rows" else B.mT) @ P
            Q.copy_(factor if self.follow == "direction" else torch.nn.functional.normalize(kept, dim=1))
            if self.error_feedback:
                (B.mT if self.q_side == "rows" else B).sub_(captured, alpha=1 - self.momentum)
        E = (X - captured).mT if self.q_side == "rows" else X - captured
        V = V.mT if self.q_side == "rows" else V
        U = V + self.tail_weight * (d - ranks).sqrt() * self._unit(E, V, batch)
        if self.even:
            length = torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True)
            U = U / _running(U, batch)
            U *= length / torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True)
        add_scaled(batch.weights, U, -self.lr * SCALES[self.scale](m, n), self.decay())
        return
        yield  # a generator that asks for nothing

    def _unit(self, E: Tensor, V: Tensor, batch: Batch) -> Tensor:
        """E at Frobenius norm 1, normalized as `tail` says."""
        m, n = E.shape[-2:]
        normalize = torch.nn.functional.normalize
        if self.tail == "none":
            return torch.zeros_like(E)
        if self.tail == "rows":
            return normalize(E, dim=2) / math.sqrt(m)
        if self.tail == "columns":
            return normalize(E, dim=1) / math.sqrt(n)
        if self.tail == "both":
            return normalize(normalize(E, dim=2), dim=1) / math.sqrt(n)
        if self.tail == "completion":
            left = (min(m, n) / m - V.square().sum(2, keepdim=True)).clamp(min=0)
            return normalize(E, dim=2) * (left / left.sum(1, keepdim=True).clamp(min=1e-30)).sqrt()
        if self.tail == "running":
            return normalize((E / _running(E, batch)).flatten(1), dim=1).view_as(E)
        if self.tail == "sign":
            return E.sign() / math.sqrt(m * n)
        return E / torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True).clamp(min=1e-30)


def _richest(R: Tensor, N: Tensor, r: int) -> Tensor:
    """Which columns of R (b, q, followed) hold the b r largest shares of the energy of their N, (b, 1, followed)."""
    shares = R.square().sum(1, keepdim=True) / N.square().sum((1, 2), keepdim=True).clamp(min=1e-30)
    chosen = torch.zeros_like(shares, dtype=torch.bool).view(-1)
    chosen[shares.view(-1).topk(min(len(R) * r, shares.numel())).indices] = True
    return chosen.view_as(shares)


def _running(X: Tensor, batch: Batch) -> Tensor:
    """The root of the running mean of the squared rows of X (b, m, n), (b, m, 1)."""
    squares = batch.state["squares"]
    squares.lerp_(X.square().mean(2, keepdim=True), 1 - BETA2)
    return squares.sqrt().clamp(min=1e-30)
