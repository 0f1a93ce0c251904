"""The same run under torch and under optax, step by step, from the same initial Q."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from orthoshard import Dion, DionTail, Muon, NorMuon
from orthoshard.jax import DimensionNumbers, dion, dion_tail, muon, normuon, torch_bridge

# torch's (m, n); d = 32 in all, so that few programs are compiled
SHAPES = {"square": (32, 32), "tall": (61, 32), "wide": (32, 48)}
STACKED = {**SHAPES, "experts": (2, 40, 32), "heads": (32, 40)}  # of which (embed, heads, head) there
NUMBERS = {"heads": DimensionNumbers(0, (1, 2))}
RATE, DECAY = 0.02, 0.01
TOLERANCE = {"float32": 2e-4, "float64": 1e-10}
RULES = {"dion": (Dion, dion), "dion_tail": (DionTail, dion_tail), "muon": (Muon, muon), "normuon": (NorMuon, normuon)}


def name(path):
    return path[-1].key


def run(rule, dtype, steps=20, shapes=SHAPES, **options):
    """Both libraries, side by side, on gradients that depend on the weights; the largest relative difference of any
    weight after each step."""
    of_torch, of_optax = RULES[rule]
    rng = np.random.default_rng(0)
    start = {key: (rng.standard_normal(shape) / 10).astype(dtype) for key, shape in shapes.items()}
    weights = {key: torch.nn.Parameter(torch.tensor(w)) for key, w in start.items()}
    optimizer = of_torch(list(weights.items()), lr=RATE, weight_decay=DECAY, **options)
    numbers = {key: NUMBERS.get(key, DimensionNumbers()) for key in shapes}
    optimizer_of_optax = of_optax(RATE, weight_decay=DECAY, dimension_numbers=numbers, **options)
    laid_out = {key: (n, m) if key != "heads" else (n, 4, m // 4) for key, (*_, m, n) in shapes.items()}
    like = {key: jnp.zeros((*shapes[key][:-2], *end), dtype) for key, end in laid_out.items()}
    moved = {"names": name, "dimension_numbers": numbers}
    params = torch_bridge.weights_from_torch(like, start, **moved)
    state = jax.jit(optimizer_of_optax.init)(params)
    if "rank_fraction" in options:
        state = torch_bridge.with_torch_basis(state, q_side=options.get("q_side", "rows"), **moved)

    @jax.jit
    def step(gradients, state, params):
        gradients = jax.tree.map(lambda g, w: g + 0.3 * w, gradients, params)
        updates, state = optimizer_of_optax.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    differences = []
    for _ in range(steps):
        noise = {key: (rng.standard_normal(w.shape) / 10).astype(dtype) for key, w in start.items()}
        for key, w in weights.items():
            w.grad = torch.tensor(noise[key]) + 0.3 * w.detach()
        optimizer.step()
        params, state = step(torch_bridge.weights_from_torch(like, noise, **moved), state, params)
        ours = torch_bridge.weights_to_torch(params, **moved)
        differences.append(max(float((ours[key] - w.data).norm() / w.data.norm()) for key, w in weights.items()))
    return differences, weights, optimizer, params, state, moved


STAGES = {
    "none": {},
    "rows": {"equilibrate": "rows", "row_moment": 0.9, "frobenius": True, "decay": "cautious"},
    "columns": {"equilibrate": "columns", "decay": "hyperball"},
    "both": {"equilibrate": "both", "row_moment": 0.9, "update_floor": 0.05},
    "momentum": {"momentum": 0.9, "scale": "rms"},
}
OWN = {
    "dion-columns": {"q_side": "columns"},
    "dion-momentum": {"error_feedback": False},
    "dion_tail-momentum": {"nesterov": False, "tail_weight": 0.5, "scale": "original"},
    "muon-momentum": {"nesterov": False, "polar": "polar_express", "scale": "spectral"},
}
slow = pytest.mark.slow
LOW_RANK = [(rule, stages, rank) for rule in ("dion", "dion_tail") for stages in STAGES for rank in (1 / 8, 1 / 2, 1.0)]
FAST = [("dion", "columns", 1 / 2), ("dion_tail", "none", 1 / 2), ("dion_tail", "both", 1.0)]
FAST += [("muon", "none", None), ("muon", "rows", None), ("muon", "momentum", None), ("normuon", "none", None)]
EVERY = LOW_RANK + [(rule, stages, None) for rule in ("muon", "normuon") for stages in STAGES]
CASES = FAST + [pytest.param(*each, marks=slow) for each in EVERY if each not in FAST]


@pytest.mark.parametrize(("rule", "stages", "rank"), CASES)
def test_every_rule_and_stage_takes_the_steps_that_torch_takes(rule, stages, rank):
    options = {**STAGES[stages], **OWN.get(f"{rule}-{stages}", {}), **({"rank_fraction": rank} if rank else {})}
    with jax.enable_x64(True):
        differences, *_ = run(rule, "float64", **options)
    assert max(differences) <= TOLERANCE["float64"]


MORE = [("dion", 1 / 8), ("dion", 1 / 2), ("dion", 1.0), ("dion_tail", 1 / 8), ("dion_tail", 1.0)]
FLOAT32 = [("dion_tail", 1 / 2), ("muon", None), *(pytest.param(*each, marks=slow) for each in MORE)]


@pytest.mark.parametrize(("rule", "rank"), FLOAT32)
def test_in_float32_they_stay_close_to_them(rule, rank):
    differences, *_ = run(rule, "float32", **({"rank_fraction": rank} if rank else {}))
    assert 0 < max(differences) <= TOLERANCE["float32"]  # two libraries, not one


def test_stacks_take_them_too_and_state_goes_both_ways():
    with jax.enable_x64(True):
        options = {"shapes": STACKED, "rank_fraction": 1 / 8, "row_moment": 0.95}
        differences, weights, optimizer, params, state, moved = run("dion", "float64", **options)
        assert max(differences) <= TOLERANCE["float64"]
        held = {key: optimizer.state[w] for key, w in weights.items()}
        found = torch_bridge.to_torch(state, **moved)
        for key in weights:
            for slot in ("momentum", "Q", "row_moment"):
                assert found[key][slot].shape == held[key][slot].shape
                assert torch.allclose(found[key][slot], held[key][slot], atol=1e-12)
        fresh = jax.tree.map(lambda x: x * (x.ndim == 0), state)  # all but counts zero
        taken = torch_bridge.from_torch(fresh, held, **moved)
        for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(state), strict=True):
            assert np.allclose(ours, theirs, atol=1e-12)
        with pytest.raises(ValueError, match="does not fit"):
            torch_bridge.from_torch(fresh, dict.fromkeys(held, held["tall"]), **moved)
        optimizer.convert_state("int8")
        with pytest.raises(ValueError, match=r"in 8 bits.*convert_state\(None\)"):
            torch_bridge.from_torch(fresh, {key: optimizer.state[w] for key, w in weights.items()}, **moved)
        with pytest.raises(ValueError, match="no MatrixState"):
            torch_bridge.to_torch(optax.adam(0.1).init(params))


def test_the_constants_are_those_of_torch():
    from orthoshard.directions import dion_tail as torch_tail
    from orthoshard.directions import low_rank
    from orthoshard.engine.storage import parameter_seed
    from orthoshard.jax import orthonormal, stages, transform
    from orthoshard.jax.directions import dion_tail, polar, proposal
    from orthoshard.linalg import columns, dependent, gram
    from orthoshard.linalg import polar as torch_polar
    from orthoshard.rules import SCALES
    from orthoshard.stages import normalize

    for key in ("MAX_ORTHOGONALITY_ERROR", "APPLIED"):
        assert getattr(orthonormal, key) == getattr(gram, key)
    assert (orthonormal.VANISHING, orthonormal.ROUNDS) == (columns.VANISHING, dependent.ROUNDS)
    for dtype, roundings in columns.COMPUTING_ROUNDINGS.items():
        ours = orthonormal.ROUNDINGS[str(dtype).removeprefix("torch.")]
        assert ours == (columns.DATA_ROUNDINGS + roundings) / 2
    for dtype, rounds in torch_polar.ROUNDS.items():
        assert polar.ROUNDS[str(dtype).removeprefix("torch.")] == rounds
    assert stages.LEAST_MOMENT == normalize.LEAST
    assert proposal.NOISE == low_rank.NOISE
    assert dion_tail.CANCELLATION == torch_tail.CANCELLATION
    for shape in ((3, 5), (5, 3)):
        assert {k: f(*shape) for k, f in stages.SCALES.items()} == {k: f(*shape) for k, f in SCALES.items()}
    assert transform.parameter_seed(3, "up.weight") == parameter_seed(3, "up.weight")
