"""What no gradient may upset; the formulas of stages are held to torch's in `test_jax_parity`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthoshard.jax import scale_by_dion, scale_by_dion_tail, scale_by_normuon

RNG = np.random.default_rng(0)


def test_error_feedback_takes_what_was_captured_before_equilibration():
    """At full rank all of M is captured: what is left of it is mu M, whatever its rows were scaled by."""
    with jax.enable_x64(True):
        transformation = scale_by_dion(rank_fraction=1, equilibrate="rows")
        gradient = jnp.asarray(RNG.standard_normal((5, 8))) * 1e30
        _, state = jax.jit(transformation.update)(gradient, transformation.init(gradient))
        assert np.allclose(state.momentum, 0.95 * gradient, rtol=1e-9)


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
    """In one stack: finite, no longer than updates are, rows that combine those of the gradient, whatever its size."""
    transformation = RULES[rule]
    gradients = jnp.asarray(np.stack([x.T for x in HARD.values()]), jnp.float32)
    state = transformation.init(gradients)
    update = jax.jit(transformation.update)
    for _ in range(3):
        updates, state = update(gradients, state)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
    updates = dict(zip(HARD, np.asarray(updates, np.float64), strict=True))
    for name, U in updates.items():
        U = U.T / np.sqrt(24 / 16)
        assert np.linalg.norm(U, 2) <= (1.25 if rule == "dion" else 3.0), name
        _, s, vh = np.linalg.svd(HARD[name])
        rows = vh[: int((s > 1e-9 * s.max()).sum())] if s.max() else vh[:0]
        assert np.linalg.norm(U - U @ rows.T @ rows) <= 2e-3, name
    for name in ("huge", "tiny"):
        if rule != "normuon":  # each has a Q of its own; the same space is reached
            assert abs(np.linalg.norm(updates[name]) / np.linalg.norm(updates["rank-3"]) - 1) < 0.05
        else:
            assert np.allclose(updates[name], updates["rank-3"], atol=1e-4)
