"""The same run under torch and under optax, step by step, from the same initial Q."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from orthoshard import Dion, DionTail, Muon
from orthoshard.jax import scale_by_dion, scale_by_dion_tail, scale_by_muon, torch_bridge

# torch's (m, n); d = 32 in all, so that few programs are compiled
SHAPES = {"square": (32, 32), "tall": (61, 32), "wide": (32, 48), "experts": (2, 40, 32)}
LR, DECAY = 0.02, 0.01
TOLERANCE = {"float32": 2e-4, "float64": 1e-10}
PAIRS = {
    "dion": (Dion, scale_by_dion),
    "dion_tail": (DionTail, scale_by_dion_tail),
    "muon": (Muon, scale_by_muon),
}


def name(path):
    return path[-1].key


def run(rule, dtype, steps=20, **options):
    """Both libraries, side by side, on gradients that depend on the weights; the largest relative difference of any
    weight after each step."""
    of_torch, of_optax = PAIRS[rule]
    rng = np.random.default_rng(0)
    start = {key: (rng.standard_normal(shape) / 10).astype(dtype) for key, shape in SHAPES.items()}
    weights = {key: torch.nn.Parameter(torch.tensor(w)) for key, w in start.items()}
    optimizer = of_torch(list(weights.items()), lr=LR, weight_decay=DECAY, **options)
    transformation = optax.chain(
        of_optax(**options), optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(LR)
    )
    params = {key: jnp.asarray(np.swapaxes(w, -1, -2)) for key, w in start.items()}
    side = options.get("q_side", "rows")
    state = jax.jit(transformation.init)(params)
    if rule != "muon":
        state = torch_bridge.with_torch_basis(state, names=name, q_side=side)

    @jax.jit
    def step(gradients, state, params):
        gradients = jax.tree.map(lambda g, w: g + 0.3 * w, gradients, params)
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    differences = []
    for _ in range(steps):
        noise = {key: (rng.standard_normal(w.shape) / 10).astype(dtype) for key, w in start.items()}
        for key, w in weights.items():
            w.grad = torch.tensor(noise[key]) + 0.3 * w.detach()
        optimizer.step()
        params, state = step({key: np.swapaxes(g, -1, -2) for key, g in noise.items()}, state, params)
        ours = torch_bridge.weights_to_torch(params, names=name)
        differences.append(max(float((ours[key] - w.data).norm() / w.data.norm()) for key, w in weights.items()))
    return differences, weights, optimizer, params, state


slow = pytest.mark.slow
FLOAT64 = [("dion", 1 / 8), ("dion_tail", 1 / 2), ("dion_tail", 1.0)]
FLOAT64 += [pytest.param(*each, marks=slow) for each in [("dion", 1 / 2), ("dion", 1.0), ("dion_tail", 1 / 8)]]


@pytest.mark.parametrize(("rule", "rank"), FLOAT64)
def test_low_rank_rules_take_the_steps_that_torch_takes(rule, rank):
    with jax.enable_x64(True):
        differences, *_ = run(rule, "float64", rank_fraction=rank)
    assert max(differences) <= TOLERANCE["float64"]


MORE = [("dion", 1 / 8), ("dion", 1 / 2), ("dion_tail", 1 / 8), ("dion_tail", 1.0)]
FLOAT32 = [("dion", 1.0), ("dion_tail", 1 / 2), *(pytest.param(*each, marks=slow) for each in MORE)]


@pytest.mark.parametrize(("rule", "rank"), FLOAT32)
def test_in_float32_they_stay_close_to_them(rule, rank):
    differences, *_ = run(rule, "float32", rank_fraction=rank)
    assert 0 < max(differences) <= TOLERANCE["float32"]  # two libraries, not one


def test_muon_takes_the_steps_that_torch_takes(dtype):
    differences, *_ = run("muon", dtype)
    assert max(differences) <= TOLERANCE[dtype]


STAGES = [
    ("dion", {"q_side": "columns"}),
    pytest.param("dion", {"error_feedback": False, "scale": "rms"}, marks=slow),
    pytest.param("dion_tail", {"nesterov": False, "tail_weight": 0.5, "scale": "original"}, marks=slow),
    ("muon", {"polar": "polar_express", "scale": "spectral", "nesterov": False, "momentum": 0.9}),
]


@pytest.mark.parametrize(("rule", "options"), STAGES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_options_mean_what_they_mean_in_torch(rule, options):
    with jax.enable_x64(True):
        if rule != "muon":
            options = {**options, "rank_fraction": 1 / 4}
        differences, *_ = run(rule, "float64", **options)
    assert max(differences) <= TOLERANCE["float64"]


def test_state_goes_both_ways():
    with jax.enable_x64(True):
        _, weights, optimizer, params, state = run("dion", "float64", steps=3, rank_fraction=1 / 8)
        held = {key: optimizer.state[w] for key, w in weights.items()}
        found = torch_bridge.to_torch(state, names=name)
        for key in weights:
            for slot in ("momentum", "Q"):
                assert found[key][slot].shape == held[key][slot].shape
                assert torch.allclose(found[key][slot], held[key][slot], atol=1e-12)
        fresh = jax.jit(scale_by_dion(rank_fraction=1 / 8).init)(params)
        taken = torch_bridge.from_torch(fresh, held, names=name)
        for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(state[0]), strict=True):
            assert np.allclose(ours, theirs, atol=1e-12)
        with pytest.raises(ValueError, match="does not fit"):
            torch_bridge.from_torch(fresh, dict.fromkeys(held, held["tall"]), names=name)
        with pytest.raises(ValueError, match="no MatrixState"):
            torch_bridge.to_torch(optax.adam(0.1).init(params))


def test_the_constants_are_those_of_torch():
    from orthoshard.directions import dion_tail as torch_tail
    from orthoshard.directions import low_rank
    from orthoshard.engine.storage import parameter_seed
    from orthoshard.jax import orthonormal, stages, transform
    from orthoshard.jax.directions import dion_tail, polar, proposal
    from orthoshard.linalg import cholesky, columns, fixed
    from orthoshard.linalg import polar as torch_polar
    from orthoshard.rules import SCALES

    assert (orthonormal.SKEW, orthonormal.APPLIED) == (cholesky.SKEW, cholesky.APPLIED)
    assert (orthonormal.VANISHING, orthonormal.ROUNDS) == (columns.VANISHING, fixed.ROUNDS)
    for dtype, roundings in columns.COMPUTING_ROUNDINGS.items():
        ours = orthonormal.ROUNDINGS[str(dtype).removeprefix("torch.")]
        assert ours == (columns.DATA_ROUNDINGS + roundings) / 2
    for dtype, rounds in torch_polar.ROUNDS.items():
        assert polar.ROUNDS[str(dtype).removeprefix("torch.")] == rounds
    assert proposal.NOISE == low_rank.NOISE
    assert dion_tail.CANCELLATION == torch_tail.CANCELLATION
    for shape in ((3, 5), (5, 3)):
        assert {k: f(*shape) for k, f in stages.SCALES.items()} == {k: f(*shape) for k, f in SCALES.items()}
    assert transform.parameter_seed(3, "up.weight") == parameter_seed(3, "up.weight")
