"""What optax users do with an optimizer: the questions of its common test of contributed optimizers, and of ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthoshard.jax import (
    DimensionNumbers,
    dion,
    dion_tail,
    hyperball,
    matrix_dimension_numbers,
    muon,
    normuon,
    scale_by_dion,
    scale_by_dion_tail,
    scale_by_muon,
)

OPTIMIZERS = {"dion": dion, "dion_tail": dion_tail, "muon": muon, "normuon": normuon}
each = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def target():
    return {"up": {"kernel": jnp.array([[3.0, -2.0, 1.0], [1.0, 4.0, 0.5]]), "bias": jnp.array([1.0, -1.0, 0.5])}}


def loss(params):
    return sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target()), strict=True))


@each
def test_it_finds_a_minimum_under_jit_and_scan_and_recompiles_nothing(make):
    optimizer = make(optax.linear_schedule(0.05, 0.001, 1500), weight_decay=0.0)
    params = jax.tree.map(jnp.zeros_like, target())
    traces = []

    def step(carry, _):
        traces.append(1)
        params, state = carry
        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params, unexpected=1)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1500)[0])
    found, state = run((params, optimizer.init(params)))
    assert loss(found) < 1e-2
    run((found, state))
    assert len(traces) == 1


@pytest.mark.parametrize("make", [dion, normuon])
def test_injected_numbers_are_those_that_were_given(make):
    params = [jnp.ones((2, 3)), jnp.ones(4)]
    gradients = jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape) - 2, params)
    plain, injected = make(0.02, momentum=0.9), optax.inject_hyperparams(make)(0.02, momentum=0.9)

    def updated(optimizer):
        return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)

    for a, b in zip(updated(plain), updated(injected), strict=True):
        assert np.allclose(a, b, rtol=1e-5)


def test_what_decides_shapes_is_not_injected():
    with pytest.raises(TypeError, match=r"static_args=\('rank_fraction',\)"):
        optax.inject_hyperparams(dion)(0.02, rank_fraction=0.5).init({"w": jnp.ones((4, 4))})
    static = optax.inject_hyperparams(dion, static_args=("rank_fraction",))(0.02, rank_fraction=0.5)
    state = static.init({"w": jnp.ones((4, 4))})
    assert state.hyperparams["learning_rate"] == np.float32(0.02)


@each
@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
def test_dtypes_and_structures_stay(make, kept):
    params = {"w": jnp.ones((4, 6), kept), "b": (jnp.ones(3, kept), jnp.ones((), kept))}
    optimizer = make(0.02)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (updates, after)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (params, state)
    )
    assert optax.tree.map_params(optimizer, lambda x: x, state) == state


def test_wrappers_of_optax():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
    nan = jax.tree.map(lambda p: p * jnp.nan, params)
    finite = optax.apply_if_finite(muon(0.02), 3)
    updates, state = jax.jit(finite.update)(nan, finite.init(params), params)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.inner_state))
    steps = optax.MultiSteps(muon(0.02), 2)
    state, update = steps.init(params), jax.jit(steps.update)
    first, state = update(params, state, params)
    second, state = update(params, state, params)
    assert all((u == 0).all() for u in jax.tree.leaves(first))
    assert all((u != 0).any() for u in jax.tree.leaves(second))
    masked = optax.masked(scale_by_muon(), {"w": True, "b": False})
    updates, _ = masked.update(params, masked.init(params))
    assert (updates["b"] == params["b"]).all()
    assert not np.allclose(updates["w"], params["w"])


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("embedding", True),
        ("token_embed", True),
        ("Embed_0", True),
        ("wte", True),
        ("lm_head", True),
        ("head", True),
        ("multi_head_attention", False),
        ("heads", False),
        ("member", False),
        ("overhead", False),
        ("up", False),
    ],
)
def test_tables_and_heads_are_known_by_the_names_of_modules(name, table):
    found = matrix_dimension_numbers({"model": {name: {"kernel": jnp.ones((2, 3))}}})
    assert (found["model"][name]["kernel"] is None) == table


def test_matrices_are_guessed_by_axes_and_names():
    shapes = {
        "embedding": (9, 4),
        "blocks": [{"kernel": (4, 4), "bias": (4,), "experts": (2, 4, 4)}],
        "lm_head": (4, 9),
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = matrix_dimension_numbers(params)
    assert found["blocks"][0]["kernel"] == DimensionNumbers(0, 1)
    rest = (found["embedding"], found["lm_head"], found["blocks"][0]["bias"], found["blocks"][0]["experts"])
    assert rest == (None,) * 4
    # a prefix of the tree, optax's own dimension numbers, and a function
    for given in (
        {
            "embedding": None,
            "blocks": [{"kernel": None, "bias": None, "experts": DimensionNumbers(1, 2)}],
            "lm_head": None,
        },
        {"embedding": None, "blocks": None, "lm_head": optax.contrib.MuonDimensionNumbers(0, 1)},
        lambda p: jax.tree.map(lambda x: DimensionNumbers() if x.ndim == 3 else None, p),
    ):
        state = jax.eval_shape(muon(0.02, dimension_numbers=given).init, params)
        assert len(jax.tree.leaves(state.inner_states["matrix"].inner_state[0].momentum)) == 1


BAD = {
    "rank_fraction=0 is outside": lambda: dion(0.02, rank_fraction=0),
    "rank_fraction=1.5 is outside": lambda: scale_by_dion_tail(rank_fraction=1.5),
    "momentum=1.0 is outside": lambda: muon(0.02, momentum=1.0),
    "row_moment=0 is outside": lambda: muon(0.02, row_moment=0),
    "rank_multiple_of=0": lambda: dion(0.02, rank_multiple_of=0),
    "scale='big' is unknown; choose one of 'spectral'": lambda: dion(0.02, scale="big"),
    "decay='none' is unknown": lambda: muon(0.02, decay="none"),
    "polar='svd' is unknown": lambda: muon(0.02, polar="svd"),
    "equilibrate='cols' is unknown": lambda: dion_tail(0.02, equilibrate="cols"),
    "q_side='left' is unknown": lambda: dion(0.02, q_side="left"),
    "w.b has shape .3,., which holds no matrix; give it to another": lambda: scale_by_dion().init(
        {"w": {"b": jnp.ones(3)}}
    ),
    "there is no axis 2": lambda: scale_by_muon(dimension_numbers=DimensionNumbers(0, 2)).init(jnp.ones((3, 3))),
    "none in common": lambda: scale_by_muon(dimension_numbers=DimensionNumbers(0, (0, 1))).init(jnp.ones((3, 3))),
    "a tree like the parameters": lambda: muon(0.02, dimension_numbers={"v": None}).init({"w": jnp.ones((3, 3))}),
    "leave update_floor out": lambda: dion(0.02, decay="hyperball", update_floor=0.1),
    "hyperball needs the parameters": lambda: hyperball(0.1).update({}, hyperball(0.1).init({})),
    "w is complex64, which no rule treats": lambda: dion(0.02).init({"w": jnp.ones((3, 3), jnp.complex64)}),
    "and one is zero": lambda: muon(0.02, decay="hyperball").init({"w": jnp.zeros((3, 3))}),
}


@pytest.mark.parametrize("sentence", BAD)
def test_mistakes_are_told_before_anything_moves(sentence):
    with pytest.raises(ValueError, match=sentence):
        BAD[sentence]()


@pytest.mark.parametrize(
    ("make", "option", "meant"),
    [
        (dion, "rank", "rank_fraction"),
        (normuon, "wd", "weight_decay"),
        (scale_by_muon, "nesterof", "nesterov"),
    ],
)
def test_an_unknown_option_is_refused_with_what_was_meant(make, option, meant):
    with pytest.raises(TypeError, match=f"{make.__name__} has no option '{option}'; did you mean '{meant}'"):
        make(**{option: 1})
