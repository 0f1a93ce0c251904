"""What microsoft/dion and torch.optim.Muon compute, as they document it, in float64, one matrix at a time."""

from __future__ import annotations

import math

import torch


def scaled(lr, adjust, m, n):
    factors = {"spectral_norm": math.sqrt(m / n), "rms_norm": 0.2 * math.sqrt(max(m, n)), None: 1.0}
    return lr * (factors | {"original": math.sqrt(max(1, m / n)), "match_rms_adamw": factors["rms_norm"]})[adjust]


def newton_schulz(X, steps, safety=1.0):
    tall = X.shape[0] > X.shape[1]
    X = (X.T if tall else X) / (safety * X.norm())
    for a, b, c in steps:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


# In the repository's files for these iterations, and in torch.optim's signature.
EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def polar_express(X):
    return newton_schulz(X, EXPRESS, 1.02)


class Theirs:
    """W -= lr wd W, and then by what `update` says."""

    def __init__(self, W, *, lr=0.01, wd=0.01, mu=0.95, adjust="spectral_norm", polar=polar_express, **options):
        self.W, self.M = W.double().clone(), torch.zeros_like(W.double())
        self.lr, self.wd, self.mu, self.adjust, self.polar = lr, wd, mu, adjust, polar
        self.v = torch.zeros(len(W), 1, dtype=torch.float64)
        self.__dict__.update(options)

    def step(self, G):
        m, n = self.W.shape
        update = self.update(G.double())
        self.W = (1 - self.lr * self.wd) * self.W - scaled(self.lr, self.adjust, m, n) * update

    def evened(self, U, rows):
        """NorMuon's second moment of the rows ``rows``, and the norm that U had."""
        self.v[rows] = 0.95 * self.v[rows] + 0.05 * U[rows].square().mean(1, keepdim=True)
        new = torch.zeros_like(U)
        new[rows] = U[rows] / (self.v[rows].sqrt() + 1e-8)
        return new * U.norm() / new.norm()


class Dion(Theirs):
    """Q, given, spans the shorter side; error feedback takes (1 - mu) P Rᵀ."""

    def update(self, G):
        self.M += G
        turned = self.M.shape[0] < self.M.shape[1]
        B = self.M.T if turned else self.M
        P = torch.linalg.qr(B @ self.Q).Q
        R = B.T @ P
        taken = (1 - self.mu) * P @ R.T
        self.M -= taken.T if turned else taken
        self.Q = R / (R.norm(dim=0) + 1e-8)
        return self.Q @ P.T if turned else P @ self.Q.T


class Muon(Theirs):
    nesterov = False

    def update(self, G):
        self.M = self.mu * self.M + G
        return self.polar(G + self.mu * self.M if self.nesterov else self.M)


class NorMuon(Muon):
    def update(self, G):
        U = super().update(G)
        return self.evened(U, torch.arange(len(U)))


class Dion2(Theirs):
    fraction, rows_only, even = 0.25, False, False

    def update(self, G):
        self.M += G
        turned = self.M.shape[1] < self.M.shape[0] and not self.rows_only
        B = self.M.T if turned else self.M
        rows = B.abs().sum(1).topk(math.ceil(self.fraction * len(B))).indices
        U, taken = torch.zeros_like(B), torch.ones(len(B), 1, dtype=B.dtype)
        U[rows], taken[rows] = self.polar(B[rows]), self.mu
        self.M *= taken.T if turned else taken
        U = U.T if turned else U
        return self.evened(U, rows) if self.even else U


class Dion3(Dion2):
    rows_only, even = True, True


class TorchMuon(Theirs):
    """Its momentum is an average: M = mu M + (1 - mu) G."""

    nesterov = True

    def update(self, G):
        self.M = torch.lerp(self.M, G, 1 - self.mu)
        return self.polar(torch.lerp(G, self.M, self.mu) if self.nesterov else self.M)


def jordan(steps, coefficients=(3.4445, -4.7750, 2.0315)):
    return lambda X: newton_schulz(X, (coefficients,) * steps)


class AdamW:
    def __init__(self, W, *, lr=0.01, wd=0.01, betas=(0.9, 0.95), eps=1e-8):
        self.W, self.m, self.v, self.t = W.double().clone(), 0.0, 0.0, 0
        self.lr, self.wd, self.betas, self.eps = lr, wd, betas, eps

    def step(self, G):
        b1, b2 = self.betas
        G, self.t = G.double(), self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * G, b2 * self.v + (1 - b2) * G * G
        denominator = (self.v / (1 - b2**self.t)).sqrt() + self.eps
        self.W = (1 - self.lr * self.wd) * self.W - self.lr / (1 - b1**self.t) * self.m / denominator


class Lion:
    def __init__(self, W, *, lr=0.01, wd=0.01, betas=(0.9, 0.95)):
        self.W, self.m = W.double().clone(), torch.zeros_like(W.double())
        self.lr, self.wd, self.betas = lr, wd, betas

    def step(self, G):
        (b1, b2), G = self.betas, G.double()
        sign = torch.sign(b1 * self.m + (1 - b1) * G)
        self.m = b2 * self.m + (1 - b2) * G
        self.W = (1 - self.lr * self.wd) * self.W - self.lr * sign
