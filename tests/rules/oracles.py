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
        X = X / X.norm()
        tall = X.shape[0] > X.shape[1]
        X = X.T if tall else X
        a, b, c = 3.4445, -4.7750, 2.0315
        for _ in range(5):
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        X = X.T if tall else X
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * self.scale * X


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
