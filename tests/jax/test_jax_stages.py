"""Stages and decays against their formulas in numpy, and what no matrix may upset."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthoshard.jax import (
    DimensionNumbers,
    add_cautious_decay,
    hyperball,
    scale_by_dion,
    scale_by_dion_tail,
    scale_by_muon,
    scale_by_normuon,
)

RNG = np.random.default_rng(0)
G = RNG.standard_normal((3, 8, 5))  # three steps of (m, n) gradients, as torch lays them out


def steps(transformation, gradients=G):
    """Updates of kernels (in, out), as (m, n)."""
    params = jnp.zeros(gradients[0].T.shape)
    state = jax.jit(transformation.init)(params)
    found, update = [], jax.jit(transformation.update)
    for gradient in gradients:
        updates, state = update(jnp.asarray(gradient.T), state)
        found.append(np.asarray(updates).T)
    return found


def jordan(N):
    x = N / np.linalg.norm(N)
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


def nesterov(mu=0.95):
    M = np.zeros_like(G[0])
    for gradient in G:
        M = mu * M + gradient
        yield gradient + mu * M


def test_normuon_is_its_formula():
    with jax.enable_x64(True):
        v, scale = np.zeros((8, 1)), np.sqrt(8 / 5)
        for got, N in zip(steps(scale_by_normuon()), nesterov(), strict=True):
            O = jordan(N)  # noqa: E741
            v = 0.95 * v + 0.05 * (O**2).mean(1, keepdims=True)
            even = O / np.sqrt(np.maximum(v, 1e-10))
            assert np.allclose(got, scale * even * np.linalg.norm(O) / np.linalg.norm(even), atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "columns", "both"])
def test_muon_equilibrates_what_the_polar_factor_sees(kind):
    with jax.enable_x64(True):
        for got, N in zip(steps(scale_by_muon(equilibrate=kind)), nesterov(), strict=True):
            rows = 1 / np.linalg.norm(N, axis=1, keepdims=True) if kind != "columns" else 1
            columns = 1 / np.linalg.norm(N, axis=0, keepdims=True) if kind != "rows" else 1
            assert np.allclose(got, np.sqrt(8 / 5) * jordan(rows * N * columns), atol=1e-12)


def test_error_feedback_takes_what_was_captured_before_equilibration():
    """At full rank all of M is captured: what is left of it is mu M, whatever its rows were scaled by."""
    with jax.enable_x64(True):
        transformation = scale_by_dion(rank_fraction=1, equilibrate="rows")
        gradient = jnp.asarray(G[0].T) * 1e30
        _, state = transformation.update(gradient, transformation.init(gradient))
        assert np.allclose(state.momentum, 0.95 * gradient, rtol=1e-9)


def test_decays_are_their_formulas():
    W, U = jnp.asarray(G[0]), jnp.asarray(G[1])
    cautious = add_cautious_decay(0.1)
    got, _ = cautious.update(U, cautious.init(W), W)
    assert np.allclose(got, U + 0.1 * W * (U * W >= 0))
    ball = hyperball(optax.constant_schedule(0.1), dimension_numbers=DimensionNumbers(1, 0))
    state, now = ball.init(W), W
    for update in (U, 5 * U):
        step, state = ball.update(update, state, now)
        moved = now - 0.1 * np.linalg.norm(now) * update / np.linalg.norm(update)
        now = now + step
        assert np.allclose(now, moved * np.linalg.norm(W) / np.linalg.norm(moved), atol=1e-6)
    with pytest.raises(ValueError, match="needs the parameters"):
        ball.update(U, state)


# --- matrices that would upset a careless rule ------------------------------------------------------------------------

LOW = RNG.standard_normal((24, 3)) @ RNG.standard_normal((3, 16))
TOWER = RNG.standard_normal((24, 16)) * np.where(np.arange(16) == 5, 1e6, 1.0)
HARD = {
    "zero": np.zeros((24, 16)),
    "rank-3": LOW,
    "zero-row-and-column": np.pad(RNG.standard_normal((23, 15)), ((1, 0), (0, 1))),
    "copies": np.repeat(RNG.standard_normal((24, 4)), 4, axis=1),
    "one-huge-column": TOWER,
    "one-entry": np.eye(24, 16) * (np.arange(16) == 3),
    "huge": LOW * 1e35,
    "tiny": LOW * 1e-34,
}
RULES = {
    "dion": scale_by_dion(rank_fraction=1 / 2, scale="spectral"),
    "dion_tail": scale_by_dion_tail(rank_fraction=1 / 2, scale="spectral"),
    "normuon": scale_by_normuon(scale="spectral"),
}


@pytest.mark.parametrize("rule", RULES)
def test_degenerate_gradients(rule):
    """All at once: finite, no longer than updates are, rows that combine those of the gradient, whatever its size."""
    transformation = RULES[rule]
    gradients = {name: jnp.asarray(x.T, jnp.float32) for name, x in HARD.items()}
    state = jax.jit(transformation.init)(gradients)
    update = jax.jit(transformation.update)
    for _ in range(3):
        updates, state = update(gradients, state)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
    for name, U in updates.items():
        U = np.asarray(U, np.float64).T / np.sqrt(24 / 16)
        assert np.linalg.norm(U, 2) <= (1.25 if rule == "dion" else 3.0), name
        _, s, vh = np.linalg.svd(HARD[name])
        rows = vh[: int((s > 1e-9 * s.max()).sum())] if s.max() else vh[:0]
        assert np.linalg.norm(U - U @ rows.T @ rows) <= 2e-3, name
    for name in ("huge", "tiny"):
        if rule != "normuon":  # whose Q are drawn by name; here the same space is reached
            assert abs(np.linalg.norm(updates[name]) / np.linalg.norm(updates["rank-3"]) - 1) < 0.05
        else:
            assert np.allclose(updates[name], updates["rank-3"], atol=1e-4)
