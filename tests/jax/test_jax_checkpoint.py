"""orbax moves a run from one mesh to another; the example with flax nnx does it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from orthoshard.jax import dion, dion_tail, state_shardings

SHAPES = {"up": (32, 64), "scale": (32,)}
SPECS = {"up": P("x", "y"), "scale": P()}


class Run:
    """A run on a mesh (x, y), of so many steps from ``at`` (number, params, state), or from the start."""

    def __init__(self, shape, make):
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        optimizer = make(0.02, rank_fraction=1 / 4, mesh=mesh)
        rng = np.random.default_rng(0)
        params = {key: jnp.asarray(rng.standard_normal(shape), jnp.float32) for key, shape in SHAPES.items()}
        params = {key: jax.device_put(p, NamedSharding(mesh, SPECS[key])) for key, p in params.items()}
        shardings = jax.tree.map(lambda p: p.sharding, params), state_shardings(optimizer, params)
        self.start = params, jax.jit(optimizer.init, out_shardings=shardings[1])(params)

        def step(params, state, seed):
            gradients = {
                key: jax.random.normal(jax.random.fold_in(jax.random.key(seed), k), p.shape) + p / 10
                for k, (key, p) in enumerate(params.items())
            }
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, out_shardings=shardings)

    def __call__(self, steps, at=None):
        first, params, state = at or (0, *self.start)
        for number in range(first, first + steps):
            params, state = self.step(params, state, number)
        return params, state


@pytest.mark.parametrize("make", [dion, pytest.param(dion_tail, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_a_checkpoint_on_other_meshes(make, tmp_path):
    runs = {shape: Run(shape, make) for shape in ((4, 2), (8, 1), (1, 1))}
    params, state = runs[4, 2](3)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", (params, state))
    expected = jax.device_get(runs[4, 2](2, (3, params, state))[0])
    for shape, run in runs.items():
        with ocp.StandardCheckpointer() as saver:
            held = saver.restore(tmp_path / "saved", jax.tree.map(ocp.utils.to_shape_dtype_struct, run.start))
        for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(run.start), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        got = jax.device_get(run(2, (3, *held))[0])
        for key, value in expected.items():
            difference = np.linalg.norm(got[key] - value) / np.linalg.norm(value)
            assert difference == 0 if shape == (4, 2) else difference <= 3e-7


@pytest.mark.slow
def test_the_example_learns_and_resumes_on_another_mesh(tmp_path):
    path = Path(__file__).parents[2] / "examples" / "jax_nnx.py"
    example = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("jax_nnx", path))
    spec.loader.exec_module(example)
    first = example.main(["--out", str(tmp_path), "--steps", "4"])
    second = example.main(["--out", str(tmp_path), "--steps", "2", "--mesh", "8", "1"])
    assert first[0] > 4.5
    assert second[-1] < first[-1] < first[0]
