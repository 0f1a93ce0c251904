"""`tail_variant`: DionTail with every choice open, written plainly, for the ablations of docs/evidence.md.

    B = mu B + G   (or B = B + G under error feedback);   N = G + mu B (Nesterov) or B
    X = N or Nᵀ;   P = orthonormal(X Q), R = Xᵀ P, `iterations` times with Q = R in between
        `sketch`: before that, one iteration on every other column of N alone, at half the price
    `share = "energy"`: of 2 r columns for each matrix of a bucket, those whose |R_j|² / |N|² is largest among all of
        its matrices are used, r a matrix on the average; Q follows all 2 r, so that a rank can grow again
    V = orthonormal(R), or R / (column norms of R) under `right = "columns"`, the first form
    next Q = V, or, under `follow = "momentum"`, B P with unit columns: the part of N that the next step sees again
    E = X - P Rᵀ, T = E normalized as `tail` says, |T|_F² = d - r: by rows, columns, both in turn, as a whole, by sign;
        `shorter`: rows, or columns if these are fewer: an orthonormal completion has exactly these at length 1
        `completion`: row i as long as it would be in an orthonormal completion of rows, |T_i|² ~ d / m - |V_i|²;
        `running`: row i over the root of a running mean of |E_i|² (NorMuon's second moment, on the tail);
        `blocks`: `block` d neighbouring rows at a time orthonormal; a block of one row is `rows`, one of all is Muon's
        `flatness`: as `rows`, times the root of its flatness |T|_F⁴ / (|TᵀT|_F² (d - r))
    U = P Vᵀ + c T; under `even`, its rows over the root of a running mean of their squares, at U's size (NorMuon)
    W = (1 - lr wd) W - lr s U;   B = B - (1 - mu) P Rᵀ under error feedback

The momentum is the library's; only what `follow` and error feedback ask of it is worked out here, which a direction of
the library would leave to its stages. One process only. A plugin: `orthoshard compare --optimizers ablations.toml`,
whose rivals name this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from orthoshard.checks import one_of
from orthoshard.directions import Direction, Proposal
from orthoshard.linalg.cholesky import cholesky_qr
from orthoshard.rules import MatrixRuleType, register
from orthoshard.slots import Slot

TAILS = (
    "none",
    "rows",
    "columns",
    "both",
    "frobenius",
    "sign",
    "completion",
    "running",
    "blocks",
    "flatness",
    "shorter",
)
BETA2 = 0.95  # NorMuon's (arXiv 2510.05491)


@dataclass(frozen=True)
class TailVariant(Direction):
    """The letters of the formula above; ``rank_fraction`` 0 is the tail alone. ``momentum``, ``nesterov`` and
    ``error_feedback`` are those of the rule."""

    linear: ClassVar[bool] = False
    withholds: ClassVar[bool] = True
    full: ClassVar[bool] = True
    dealable: ClassVar[bool] = False

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
    block: float = 1 / 16
    even: bool = False
    q_side: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        one_of("tail", self.tail, TAILS)
        one_of("right", self.right, ("columns", "qr"))
        one_of("share", self.share, ("even", "energy"))
        one_of("follow", self.follow, ("direction", "momentum"))

    def rank(self, m: int, n: int) -> int:
        return math.ceil(self.rank_fraction * min(m, n))

    def _followed(self, m: int, n: int) -> int:
        """Return the number of columns of Q."""
        return min(self.rank(m, n) * (2 if self.share == "energy" else 1), m, n)

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        if self.tail == "running" or self.even:
            found["squares"] = Slot(("rows", 1), kept)
        if self.follow == "momentum":
            found["followed"] = Slot(("rows", "columns"), kept)
        r = self._followed(*shape)
        return found | ({"Q": Slot((self.q_side, r), kept, fill="normal")} if r else {})

    def propose(self, seen, state, shape):
        (m, n), d = shape, min(shape)
        N = seen.formed()
        X = N.mT if self.q_side == "rows" else N
        r, captured, V = self.rank(m, n), torch.zeros_like(X), torch.zeros_like(X)
        ranks = torch.full((len(N), 1, 1), r, device=N.device)
        if r:
            Q = state["Q"]
            right = Q
            if self.sketch:
                half = X[:, ::2]
                right = half.mT @ cholesky_qr(half @ right)
            for _ in range(self.iterations):
                P = cholesky_qr(X @ right)
                R = X.mT @ P
                right = R
            factor = cholesky_qr(R) if self.right == "qr" else torch.nn.functional.normalize(R, dim=1)
            used = factor
            if self.share == "energy":
                live = _richest(R, N, r)
                R, ranks = R * live, live.sum((1, 2), keepdim=True)
                used = cholesky_qr(R)
            captured = P @ R.mT
            V = P @ used.mT
            new = factor
            if self.follow == "momentum":
                B = self._followed_momentum(seen, state)
                new = torch.nn.functional.normalize((B if self.q_side == "rows" else B.mT) @ P, dim=1)
            Q.copy_(new)
        E = (X - captured).mT if self.q_side == "rows" else X - captured
        V = V.mT if self.q_side == "rows" else V
        U = V + self.tail_weight * (d - ranks).sqrt() * self._unit(E, V, state)
        if self.even:
            length = torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True)
            U = U / _running(U, state)
            U *= length / torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True)
        if r and self.error_feedback:  # N is B itself then
            taken = (captured.mT if self.q_side == "rows" else captured) * (1 - self.momentum)
            seen.N.sub_(taken if seen.size is None else taken * seen.size)
            if self.follow == "momentum":
                state["followed"].copy_(seen.N)
        return Proposal(full=U)
        yield  # a generator that asks for nothing

    def _followed_momentum(self, seen, state) -> Tensor:
        """Return B, whose place Nesterov's N = (G + mu B) / (1 + mu) has taken, from B of the last step."""
        before, mu = state["followed"], self.momentum
        if self.nesterov:
            G = seen.N - mu**2 / (1 + mu) * before
            before.mul_(mu).add_(G)
        else:
            before.copy_(seen.N)
        return before

    def _unit(self, E: Tensor, V: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Scale E to Frobenius norm 1, after the normalization that `tail` names."""
        m, n = E.shape[-2:]
        normalize = torch.nn.functional.normalize
        if self.tail == "none":
            return torch.zeros_like(E)
        if self.tail == "rows" or (self.tail == "shorter" and m <= n):
            return normalize(E, dim=2) / math.sqrt(m)
        if self.tail in ("columns", "shorter"):
            return normalize(E, dim=1) / math.sqrt(n)
        if self.tail == "both":
            return normalize(normalize(E, dim=2), dim=1) / math.sqrt(n)
        if self.tail == "completion":
            left = (min(m, n) / m - V.square().sum(2, keepdim=True)).clamp(min=0)
            return normalize(E, dim=2) * (left / left.sum(1, keepdim=True).clamp(min=1e-30)).sqrt()
        if self.tail == "running":
            return normalize((E / _running(E, state)).flatten(1), dim=1).view_as(E)
        if self.tail == "blocks":
            return _orthonormal_blocks(E, math.ceil(self.block * min(m, n))) / math.sqrt(m)
        if self.tail == "flatness":
            unit = normalize(E, dim=2) / math.sqrt(m)
            gram = unit.mT @ unit if n <= m else unit @ unit.mT
            left = max(1, min(m, n) - self.rank(m, n))
            return unit / (gram.square().sum((1, 2), keepdim=True) * left).sqrt().clamp(min=1e-30)
        if self.tail == "sign":
            return E.sign() / math.sqrt(m * n)
        return E / torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True).clamp(min=1e-30)


def _richest(R: Tensor, N: Tensor, r: int) -> Tensor:
    """Return which columns of R (b, q, followed) hold the b r largest shares of energy of their N, (b, 1, followed)."""
    shares = R.square().sum(1, keepdim=True) / N.square().sum((1, 2), keepdim=True).clamp(min=1e-30)
    chosen = torch.zeros_like(shares, dtype=torch.bool).view(-1)
    chosen[shares.view(-1).topk(min(len(R) * r, shares.numel())).indices] = True
    return chosen.view_as(shares)


def _orthonormal_blocks(X: Tensor, size: int) -> Tensor:
    """Return X (b, m, n) with ``size`` rows at a time in the nearest orthonormal form. Directions below 1e-4 of their
    block's longest are left at 0."""
    b, m, n = X.shape
    blocks = torch.nn.functional.pad(X, (0, 0, 0, -m % size)).view(b, -1, size, n)
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    kept = s > 1e-4 * s[..., :1].clamp(min=1e-30)
    return ((u * kept[..., None, :]) @ v).reshape(b, -1, n)[:, :m]


def _running(X: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the root of the running mean of the squared rows of X (b, m, n), as (b, m, 1)."""
    squares = state["squares"]
    squares.lerp_(X.square().mean(2, keepdim=True), 1 - BETA2)
    return squares.sqrt().clamp(min=1e-30)


register(MatrixRuleType("tail_variant", TailVariant, {"lr": 0.01, "nesterov": True}))
