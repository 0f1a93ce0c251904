"""The update rules as their papers print them, in float64, one matrix at a time. Slow, plain, and independent."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scale(name: str, m: int, n: int) -> float:
    return {"spectral": math.sqrt(m / n), "original": max(1.0, m / n) ** 0.5, "rms": 0.2 * max(m, n) ** 0.5}[name]


class DionOracle:
    """arXiv 2504.05295 v3, Algorithm 1: power iteration, QR, error feedback, column normalization."""

    def __init__(
        self, W: Tensor, Q: Tensor, *, lr=0.02, wd=0.01, mu=0.95, side="rows", feedback=True, convention="spectral"
    ):
        self.W, self.Q = W.double().clone(), Q.double().clone()
        self.M = torch.zeros_like(self.W)
        self.lr, self.wd, self.mu, self.side, self.feedback = lr, wd, mu, side, feedback
        self.scale = scale(convention, *W.shape)

    def step(self, G: Tensor) -> None:
        B = (self.M if self.feedback else self.mu * self.M) + G.double()
        B = B.T if self.side == "rows" else B
        P = torch.linalg.qr(B @ self.Q).Q
        R = B.T @ P
        if self.feedback:
            B = B - (1 - self.mu) * P @ R.T
        self.Q = R / R.norm(dim=0)
        update = P @ self.Q.T
        self.M, update = (B.T, update.T) if self.side == "rows" else (B, update)
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * self.scale * update


class DionTailOracle:
    """DionTail with its tail formed: N less its projection on the captured directions, rows divided by their norms."""

    def __init__(
        self, W: Tensor, Q: Tensor, *, lr=0.02, wd=0.01, mu=0.95, nesterov=True, tail=1.0, convention="spectral"
    ):
        self.W, self.Q = W.double().clone(), Q.double().clone()
        self.M = torch.zeros_like(self.W)
        self.lr, self.wd, self.mu, self.nesterov, self.tail = lr, wd, mu, nesterov, tail
        self.scale = scale(convention, *W.shape)

    def step(self, G: Tensor) -> None:
        m, n = self.W.shape
        G = G.double()
        self.M = self.mu * self.M + G
        N = G + self.mu * self.M if self.nesterov else self.M
        P = torch.linalg.qr(N.T @ self.Q).Q
        R = N @ P
        r = P.shape[1]
        E = N @ (torch.eye(n, dtype=N.dtype) - P @ P.T)
        T = E / E.norm(dim=1, keepdim=True) * math.sqrt((min(m, n) - r) / m) if r < min(m, n) else torch.zeros_like(N)
        V, triangle = torch.linalg.qr(R)
        self.Q = V * triangle.diagonal().sign()
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * self.scale * (self.Q @ P.T + self.tail * T)


class MuonOracle:
    """K. Jordan, 2024: momentum, Nesterov, five Newton-Schulz steps."""

    def __init__(self, W: Tensor, *, lr=0.02, wd=0.01, mu=0.95, nesterov=True, convention="original"):
        self.W, self.M = W.double().clone(), torch.zeros_like(W.double())
        self.lr, self.wd, self.mu, self.nesterov = lr, wd, mu, nesterov
        self.scale = scale(convention, *W.shape)

    def step(self, G: Tensor) -> None:
        G = G.double()
        self.M = self.mu * self.M + G
        X = G + self.mu * self.M if self.nesterov else self.M
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * self.scale * newton_schulz(X)


class AdamWOracle:
    """arXiv 1711.05101, Algorithm 2."""

    def __init__(self, W: Tensor, *, lr=3e-3, wd=0.0, betas=(0.9, 0.95), eps=1e-8):
        self.W = W.double().clone()
        self.m, self.v, self.t = torch.zeros_like(self.W), torch.zeros_like(self.W), 0
        self.lr, self.wd, self.betas, self.eps = lr, wd, betas, eps

    def step(self, G: Tensor) -> None:
        G = G.double()
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * G
        self.v = b2 * self.v + (1 - b2) * G * G
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * m / (v.sqrt() + self.eps)


class LionOracle:
    """arXiv 2302.06675, Algorithm 2."""

    def __init__(self, W: Tensor, *, lr=1e-3, wd=0.0, betas=(0.95, 0.98)):
        self.W, self.m = W.double().clone(), torch.zeros_like(W.double())
        self.lr, self.wd, self.betas = lr, wd, betas

    def step(self, G: Tensor) -> None:
        G = G.double()
        b1, b2 = self.betas
        update = torch.sign(b1 * self.m + (1 - b1) * G)
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * update
        self.m = b2 * self.m + (1 - b2) * G


def newton_schulz(X: Tensor) -> Tensor:
    """Five steps of K. Jordan's polynomial."""
    X = X / X.norm() if X.norm() > 0 else X
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


def basis_of(Q: Tensor | None) -> Tensor:
    assert Q is not None
    return Q.double().clone()


class DionStep:
    """(U, what was captured of X): P, R, V of one power iteration, all formed. ``tail``: DionTail's."""

    def __init__(self, Q: Tensor | None, tail: bool = False):
        self.Q, self.tail = basis_of(Q), tail

    def __call__(self, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        m, n = X.shape
        P = torch.linalg.qr(X.T @ self.Q).Q
        R = X @ P
        if not self.tail:
            self.Q = R / R.norm(dim=0)
            return self.Q @ P.T, R @ P.T
        V, triangle = torch.linalg.qr(R)
        self.Q = V * triangle.diagonal().sign()
        E, r, d = X - R @ P.T, P.shape[1], min(m, n)
        T = E / E.norm(dim=1, keepdim=True) * math.sqrt((d - r) / m) if r < d else torch.zeros_like(E)
        return self.Q @ P.T + T, R @ P.T


class PolarStep:
    def __init__(self, Q: Tensor | None = None):
        pass

    def __call__(self, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        return newton_schulz(X), X


class SelectStep:
    """Dion3 (arXiv 2608.11612): the rows of largest l1 norm, or columns where these are fewer; polar; lr / sqrt(f)."""

    def __init__(self, Q: Tensor | None = None, fraction: float = 0.25):
        self.fraction, self.size = fraction, 1 / math.sqrt(fraction)

    def __call__(self, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        m, n = X.shape
        columns = n < m
        X = X.T if columns else X
        chosen = X.abs().sum(1).topk(math.ceil(self.fraction * X.shape[0])).indices
        U, applied = torch.zeros_like(X), torch.zeros_like(X)
        U[chosen], applied[chosen] = newton_schulz(X[chosen]), X[chosen]
        return (U.T, applied.T) if columns else (U, applied)


class RowsStep:
    """RMNP (2603.20527); ``tangent``: Nora (2605.03769)."""

    def __init__(self, Q: Tensor | None = None, tangent: bool = False):
        self.tangent = tangent

    def __call__(self, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        if self.tangent:
            X = X - ((X * W).sum(1) / W.square().sum(1))[:, None] * W
        return X / X.norm(dim=1, keepdim=True), X


class StackOracle:
    """A direction with every stage round it, each as docs/rules.md prints it, on one matrix."""

    def __init__(
        self, W: Tensor, direction, *, lr=0.02, wd=0.01, mu=0.95, nesterov=False, feedback=False, convention="spectral",
        equilibrate="none", row_moment=0.0, frobenius=False, decay="decoupled", floor=0.0,
    ):  # fmt: skip
        self.W, self.direction = W.double().clone(), direction
        self.M, self.v = torch.zeros_like(self.W), torch.zeros(len(W), dtype=torch.float64)
        self.lr, self.wd, self.mu, self.nesterov, self.feedback = lr, wd, mu, nesterov, feedback
        self.equilibrate, self.b, self.frobenius, self.decay, self.floor = (
            equilibrate,
            row_moment,
            frobenius,
            decay,
            floor,
        )
        self.scale, self.radius = scale(convention, *W.shape) * getattr(direction, "size", 1.0), self.W.norm()

    def step(self, G: Tensor) -> None:
        G = G.double()
        self.M = (1 if self.feedback else self.mu) * self.M + G
        N = G + self.mu * self.M if self.nesterov else self.M
        rows, columns = torch.ones(N.shape[0], 1).double(), torch.ones(1, N.shape[1]).double()
        power = 0.5 if self.equilibrate == "both" else 1.0
        if self.equilibrate in ("rows", "both"):
            rows = N.norm(dim=1, keepdim=True) ** -power
        if self.equilibrate in ("columns", "both"):
            columns = N.norm(dim=0, keepdim=True) ** -power
        U, applied = self.direction(rows * N * columns, self.W)
        if self.feedback:
            self.M = self.M - (1 - self.mu) * applied / rows / columns
        if self.b:
            squares = U.square().mean(1)
            moves = squares > 0
            self.v = torch.where(moves, self.b * self.v + (1 - self.b) * squares, self.v)
            V = U / self.v.clamp(min=1e-10).sqrt()[:, None]
            U = V * (U.norm() / V.norm())
        if self.frobenius:
            U = U * math.sqrt(min(U.shape)) / U.norm()
        size = self.lr * self.scale
        if self.decay == "hyperball":
            norm = self.W.norm()
            self.W = self.W * self.radius / norm - self.lr * self.radius * U / U.norm()
            return
        if self.floor and self.scale * U.norm() < self.floor * self.W.norm():
            size = self.lr * self.floor * self.W.norm() / U.norm()
        kept = self.lr * self.wd * self.W
        if self.decay == "cautious":
            kept = torch.where(U * self.W >= 0, kept, 0)
        self.W = self.W - kept - size * U
