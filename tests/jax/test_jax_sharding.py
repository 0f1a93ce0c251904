"""Sharded parameters take the steps of whole ones, and only thin things travel."""

from __future__ import annotations

from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from orthoshard.jax import (
    DimensionNumbers,
    dion,
    scale_by_dion,
    scale_by_dion_tail,
    scale_by_muon,
    scale_by_normuon,
    state_shardings,
)

KIB = 1024


def mesh_of(*shape, kind=AxisType.Auto):
    names = ("x", "y", "z")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def sharded(params, mesh, specs):
    return {key: jax.device_put(p, NamedSharding(mesh, specs[key])) for key, p in params.items()}


# --- the same steps ---------------------------------------------------------------------------------------------------

# (in, out), experts (e, in, out), heads (embed, heads, head)
SHAPES = {"wide": (16, 48), "tall": (48, 16), "experts": (4, 16, 24), "heads": (16, 4, 8)}
NUMBERS = {
    "wide": DimensionNumbers(0, 1),
    "tall": DimensionNumbers(0, 1),
    "experts": DimensionNumbers(1, 2),
    "heads": DimensionNumbers(0, (1, 2)),
}
LAST, XY = P(None, None, "x"), ("x", "y")
LAYOUTS = {
    "output": ((8,), {"wide": P(None, "x"), "tall": P(None, "x"), "experts": LAST, "heads": LAST}),
    "reduction": ((8,), {"wide": P("x"), "tall": P("x"), "experts": P(None, "x"), "heads": P("x")}),
    "both": ((4, 2), {"wide": P("x", "y"), "tall": P("x", "y"), "experts": P("x", "y"), "heads": P("y", "x")}),
    "two-axes-on-one": ((4, 2), {"wide": P(None, XY), "tall": P(XY), "experts": P("x", None, "y"), "heads": LAST}),
    "replicated": ((8,), {"wide": P(), "tall": P(), "experts": P(), "heads": P()}),
}
RULES = {
    "dion": lambda **more: scale_by_dion(rank_fraction=1 / 4, **more),
    "dion-columns": lambda **more: scale_by_dion(rank_fraction=1 / 4, q_side="columns", row_moment=0.95, **more),
    "dion_tail": lambda **more: scale_by_dion_tail(rank_fraction=1 / 4, equilibrate="rows", **more),
    "normuon": lambda **more: scale_by_normuon(**more),
}


def gradients(step, keys):
    rng = np.random.default_rng(step)
    drawn = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
    return {key: jnp.asarray(drawn[key]) for key in keys}


def trajectory(transformation, params, steps=3, shardings=None):
    """The parameters after so many steps, gradients lying as they do."""
    transformation = optax.chain(transformation, optax.scale_by_learning_rate(0.02))
    traces = []

    def step(gradients, state, params):
        traces.append(len(traces))
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    if shardings is None:
        init, step = jax.jit(transformation.init), jax.jit(step)
    else:
        of_state = state_shardings(transformation, params)
        init, step = (
            jax.jit(transformation.init, out_shardings=of_state),
            jax.jit(step, out_shardings=(shardings, of_state)),
        )
    state = init(params)
    for number in range(steps):
        given = gradients(number, params)
        given = given if shardings is None else jax.device_put(given, shardings)
        params, state = step(given, state, params)
    assert len(traces) == 1
    return jax.device_get(params), state


@pytest.fixture(scope="module")
def whole():
    """Trajectories of whole parameters, by rule and parameters."""
    found = {}

    def of(rule, keys):
        if (rule, keys) not in found:
            found[rule, keys] = trajectory(RULES[rule](dimension_numbers=numbers(keys)), start(keys))[0]
        return found[rule, keys]

    return of


def start(keys):
    return {key: g / 10 for key, g in gradients(99, keys).items()}


def numbers(keys):
    return {key: NUMBERS[key] for key in keys}


# What is compiled most is a rule, not a parameter: fast cases have each of these somewhere, slow ones all of them.
FAST = {
    ("dion", "reduction"): ("wide", "heads"),
    ("dion_tail", "both"): ("tall", "experts"),
    ("normuon", "output"): tuple(SHAPES),
}
EVERY = [(rule, layout, tuple(SHAPES)) for rule in RULES for layout in LAYOUTS]
CASES = [(*case, keys) for case, keys in FAST.items()]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in CASES]


@pytest.mark.filterwarnings("ignore:axes .* cut a parameter")
@pytest.mark.parametrize(("rule", "layout", "keys"), CASES)
def test_sharded_equals_whole_to_rounding(rule, layout, keys, whole):
    with jax.enable_x64(True):
        shape, specs = LAYOUTS[layout]
        mesh = mesh_of(*shape)
        params = sharded(start(keys), mesh, specs)
        shardings = {key: p.sharding for key, p in params.items()}
        got, state = trajectory(RULES[rule](dimension_numbers=numbers(keys), mesh=mesh), params, shardings=shardings)
        for key, value in whole(rule, keys).items():
            assert np.allclose(got[key], value, rtol=0, atol=1e-12), key
        for key, momentum in state[0].momentum.items():
            assert momentum.sharding.is_equivalent_to(shardings[key], momentum.ndim)


def test_explicit_axes_are_whole_to_rounding_too(whole):
    """`optax.contrib.muon` raises here. State lies as its parameter does."""
    with jax.enable_x64(True):
        shape, specs = LAYOUTS["both"]
        keys = FAST["dion_tail", "both"]
        mesh = mesh_of(*shape, kind=AxisType.Explicit)
        with jax.set_mesh(mesh):
            params = {key: jax.sharding.reshard(p, specs[key]) for key, p in start(keys).items()}
            transformation = RULES["dion_tail"](dimension_numbers=numbers(keys))
            got, state = trajectory(transformation, params, shardings=jax.tree.map(lambda p: p.sharding, params))
            for key, value in whole("dion_tail", keys).items():
                assert np.allclose(got[key], value, rtol=0, atol=1e-12), key
            for Q in (state[0].Q, transformation.init(params).Q, jax.eval_shape(transformation.init, params).Q):
                assert Q["tall"].sharding.spec == P("x", "y")


@pytest.mark.parametrize("rule", [scale_by_dion, pytest.param(scale_by_dion_tail, marks=pytest.mark.slow)])
def test_lengths_that_a_mesh_does_not_divide(rule):
    """Inside jit JAX cuts them unevenly, with padding that may count nowhere."""
    mesh = mesh_of(4, 2)
    gradient = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((17, 31)), jnp.float32)}
    transformation = rule(mesh=mesh)

    @partial(jax.jit, static_argnums=2)
    def update(gradient, state, cut):
        if cut:
            place = NamedSharding(mesh, P("x", "y"))
            gradient, state = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), (gradient, state))
        return transformation.update(gradient, state)

    states = [transformation.init(gradient)] * 2
    for _ in range(2):
        pairs = [update(gradient, states[cut], cut) for cut in (False, True)]
        states = [state for _, state in pairs]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_the_initial_basis_depends_on_name_and_seed_and_on_no_layout():
    mesh = mesh_of(4, 2)
    params = {"up": jnp.zeros((16, 32)), "down": jnp.zeros((16, 32))}
    transformation = scale_by_dion(rank_fraction=1 / 2)
    Q = transformation.init(params).Q
    placed = transformation.init(sharded(params, mesh, {"up": P("x", "y"), "down": P(("x", "y"))})).Q
    assert placed["up"].sharding.spec == P("x", "y")
    assert placed["up"].addressable_shards[0].data.shape == (2, 16)
    for key in params:
        assert np.array_equal(Q[key], placed[key])
    assert not np.array_equal(Q["up"], Q["down"])
    assert not np.array_equal(Q["up"], scale_by_dion(rank_fraction=1 / 2, seed=1).init(params).Q["up"])
    assert abs(float(jnp.linalg.norm(Q["up"][0])) - 1) < 0.5  # rows of (r, out): columns of Q, about 1 long


def test_a_basis_is_not_cut_by_an_axis_that_does_not_divide_its_rank():
    mesh = mesh_of(4, 2)
    params = sharded({"w": jnp.zeros((24, 32))}, mesh, {"w": P("x", "y")})
    for init in (scale_by_dion().init, partial(state_shardings, scale_by_dion())):
        with pytest.warns(UserWarning, match=r"axes x cut a parameter in 4, but not the rank 6 .* rank_multiple_of=4"):
            state = init(params)
        assert getattr(state.Q["w"], "sharding", state.Q["w"]).spec == P(None, "y")
    rounded = scale_by_dion(rank_fraction=1 / 4, rank_multiple_of=4)
    assert rounded.init(params).Q["w"].sharding.spec == P("x", "y")  # r = 8
    optimizer = dion(0.02, rank_multiple_of=4)
    params["bias"] = jax.device_put(jnp.zeros(32), NamedSharding(mesh, P("y")))
    shardings = state_shardings(optimizer, params)
    specs = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_flatten_with_path(shardings)[0]}
    assert {spec for name, spec in specs.items() if "'w'" in name} == {P("x", "y")}
    assert {spec for name, spec in specs.items() if "'bias'" in name} == {P("y")}
    assert {spec for name, spec in specs.items() if "count" in name} == {P()}


# --- what travels -----------------------------------------------------------------------------------------------------


def test_the_reader_of_programs_counts_as_formulas_say():
    mesh = mesh_of(4, 2)
    full, rows, columns = (NamedSharding(mesh, spec) for spec in (P(), P("x"), P(None, "y")))

    def of(spec):
        return jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=spec)

    def sent(f, *arguments, out):
        program = jax.jit(f, out_shardings=out).lower(*arguments).compile().as_text()
        return sorted((c.kind, c.devices, c.elements, c.sent) for c in hlo.collectives(program))

    assert sent(lambda x: x, of(rows), out=full) == [("all-gather", 4, 2048, 2048 * 4 * 3 / 4)]
    assert sent(lambda x: x @ x.T, of(columns), out=full) == [("all-reduce", 2, 4096, 2 * 4096 * 4 / 2)]
    assert sent(lambda x: x + 1, of(rows), out=rows) == []
    line = "  %r = f32[8,32]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}"
    assert hlo.collectives(line) == [("reduce-scatter", 8, 2048, 8 * 32 * 4 * 7)]
    line = "  %r = (f32[16]{0}, bf16[8]{0}) all-to-all(%x, %y), replica_groups={{0,1,2,3},{4,5,6,7}}"
    assert hlo.collectives(line) == [("all-to-all", 4, 16, 80 * 3 / 4)]


N, M, R = 768, 3072, 192
# One Gram pass, in KiB, with Q whole along r and with Q cut as the parameter.
BUDGET = {
    "output": ((8,), P(None, "x"), 1009, 1009),
    "reduction": ((8,), P("x", None), 4284, 6300),
    "both": ((4, 2), P("x", "y"), 2089, 2953),
}
MUON = {"output": 20_160, "reduction": 90_720, "both": 46_080}  # optax.contrib.muon's, measured once


# Every figure is a product of two lengths: a sixth of each shows them as well, and compiles in a third of the time.
each_size = pytest.mark.parametrize("part", [6, pytest.param(1, marks=pytest.mark.slow)])


def program_of(transformation, mesh, spec, whole_basis, part):
    shape = (N // part, M // part)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))}
    shapes = jax.eval_shape(transformation.init, params)
    shardings = state_shardings(transformation, params)
    if whole_basis:
        shardings = shardings._replace(Q={"w": NamedSharding(mesh, P(None, *spec[1:]))})
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    out = ({"w": params["w"].sharding}, shardings)
    return jax.jit(transformation.update, out_shardings=out).lower(params, state).compile().as_text()


@each_size
@pytest.mark.parametrize("layout", BUDGET)
def test_dion_sends_thin_things_alone(layout, part):
    shape, spec, *budgets = BUDGET[layout]
    mesh = mesh_of(*shape)
    for whole_basis, budget in zip((True, False), budgets, strict=True):
        found = hlo.collectives(program_of(scale_by_dion(mesh=mesh), mesh, spec, whole_basis, part))
        assert sum(c.sent for c in found) <= (budget / part**2 + 1) * KIB
        assert max(c.elements for c in found) <= max(N, M) * R / part**2
    assert budgets[1] < MUON[layout] / 10
    whole_matrix = hlo.collectives(program_of(scale_by_muon(mesh=mesh), mesh, spec, False, part))
    assert sum(c.sent for c in whole_matrix) <= MUON[layout] * KIB / 2 / part**2


@each_size
def test_dion_tail_sends_one_gram_and_row_norms_more(part):
    for layout, (shape, spec, budget, _) in BUDGET.items():
        mesh = mesh_of(*shape)
        found = hlo.collectives(program_of(scale_by_dion_tail(mesh=mesh), mesh, spec, True, part))
        gram = 2 * R * R * 4 * (1 - 1 / shape[-1]) / part**2 if layout != "reduction" else 0
        rows = 2 * M * 4 / part
        assert sum(c.sent for c in found) <= (budget / part**2 + 1) * KIB + gram + rows
        assert max(c.elements for c in found) <= max(N, M) * R / part**2


LAYERS = 8


def test_owners_keep_the_state_of_their_layers_and_publish_thin_factors():
    """A stack of layers (8, in, out), replicated; its state cut by layers. Updates would be the whole stack."""
    mesh = mesh_of(8)
    replicated = NamedSharding(mesh, P())
    params = {"w": jax.ShapeDtypeStruct((LAYERS, 64, 128), jnp.float32, sharding=replicated)}
    sent = {}
    for shard_state in (None, "zero1"):
        transformation = scale_by_dion(mesh=mesh, shard_state=shard_state)
        shardings = state_shardings(transformation, params, owners="x")
        assert shardings.momentum["w"].spec == P("x", None, None)
        shapes = jax.eval_shape(transformation.init, params)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        update = jax.jit(transformation.update, out_shardings=({"w": replicated}, shardings))
        sent[shard_state] = sum(c.sent for c in hlo.collectives(update.lower(params, state).compile().as_text()))
    stack, thin = LAYERS * 64 * 128 * 4 * 7 / 8, LAYERS * (64 + 128) * 16 * 4 * 7 / 8
    assert sent[None] >= stack
    assert sent["zero1"] <= thin + KIB
    whole = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((LAYERS, 64, 128)), jnp.float32)}
    placed = {"w": jax.device_put(whole["w"], replicated)}
    got, _ = update(placed, jax.jit(transformation.init, out_shardings=shardings)(placed))
    plain = scale_by_dion()
    expected, _ = jax.jit(plain.update)(whole, jax.jit(plain.init)(whole))
    assert np.allclose(got["w"], expected["w"], atol=1e-5)


def test_replicas_exchange_thin_products_in_place_of_gradients():
    """The mean of their momenta is the momentum of the mean gradient: the same steps, fewer bytes."""
    k, mesh = 8, mesh_of(8)
    rng = np.random.default_rng(0)
    own = [jnp.asarray(rng.standard_normal((k, 64, 128)), jnp.float32) for _ in range(3)]
    params = {"w": jax.device_put(jnp.zeros((64, 128)), NamedSharding(mesh, P()))}
    apart, plain = scale_by_dion(rank_fraction=1 / 8, replicas=k), scale_by_dion(rank_fraction=1 / 8)
    shardings = state_shardings(apart, params, replicas="x")
    assert shardings.momentum["w"].spec == P("x", None, None)
    state, whole = jax.jit(apart.init, out_shardings=shardings)(params), plain.init(params)
    update = jax.jit(apart.update, out_shardings=({"w": NamedSharding(mesh, P())}, shardings))
    update_of_whole = jax.jit(plain.update)
    for gradients in own:
        placed = {"w": jax.device_put(gradients, NamedSharding(mesh, P("x")))}
        got, state = update(placed, state)
        expected, whole = update_of_whole({"w": gradients.mean(0)}, whole)
        assert np.allclose(got["w"], expected["w"], atol=2e-5)
    assert np.allclose(state.momentum["w"].mean(0), whole.momentum["w"], atol=1e-5)
    found = hlo.collectives(update.lower(placed, state).compile().as_text())
    assert sum(c.sent for c in found) <= 2 * (64 + 128) * 8 * 4 * 7 / 8 + KIB
    assert 4 * sum(c.sent for c in found) < 2 * 64 * 128 * 4 * 7 / 8  # what the gradients would take
    with pytest.raises(ValueError, match="in front of the parameter's axes"):
        apart.update(params, state)
    with pytest.raises(ValueError, match="row norms of the mean gradient"):
        scale_by_dion(replicas=k, equilibrate="rows")
