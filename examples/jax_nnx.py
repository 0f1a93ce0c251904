"""JAX with flax nnx: a sharded model on eight simulated devices, a checkpoint, and the same run on another mesh.

python examples/jax_nnx.py                      # 4 x 2: FSDP over four, tensor parallelism over two
python examples/jax_nnx.py --mesh 8 1           # goes on after the checkpoint of the first, on another mesh
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from orthoshard.jax import dion, state_shardings

VOCABULARY, WIDTH, LENGTH, BATCH = 64, 32, 16, 8


class Block(nnx.Module):
    """A gated unit: two kernels (in, out), cut along both axes, in opposite order."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def spec(path, p) -> P:
    """Return how a parameter is sharded: kernels along both axes, the table and the head along one, norms not."""
    name = jax.tree_util.keystr(path)
    if "up" in name:
        return P("data", "model")
    if "down" in name:
        return P("model", "data")
    return P("data") if p.ndim == 2 else P()


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=int, nargs=2, default=(4, 2), metavar=("DATA", "MODEL"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "orthoshard-jax-nnx")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)

    mesh = jax.make_mesh(tuple(args.mesh), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):  # the optimizer finds it here
        graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
        params = jax.tree.map_with_path(lambda path, p: jax.device_put(p, NamedSharding(mesh, spec(path, p))), params)
        optimizer = dion(optax.cosine_decay_schedule(0.02, 100), rank_fraction=1 / 4)  # where optax.adamw(...) was
        shardings = state_shardings(optimizer, params)
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)

        def loss(params, tokens):
            logits = nnx.merge(graph, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        def step(params, state, tokens):
            value, gradients = jax.value_and_grad(loss)(params, tokens)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        placed = jax.tree.map(lambda p: p.sharding, params)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(placed, shardings, NamedSharding(mesh, P())))

        with ocp.CheckpointManager(args.out.absolute()) as manager:
            first = manager.latest_step() or 0
            if first:  # arrays of the new mesh say where each piece goes
                wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": state})
                found = manager.restore(first, args=ocp.args.StandardRestore(wanted))
                params, state = found["params"], found["state"]
            losses = []
            for number in range(first, first + args.steps):
                start = jax.random.randint(jax.random.key(number), (BATCH, 1), 0, VOCABULARY)
                tokens = (start + jnp.arange(LENGTH + 1) * 3) % VOCABULARY
                params, state, value = step(params, state, jax.device_put(tokens, NamedSharding(mesh, P("data"))))
                losses.append(float(value))
                print(f"step {number + 1:3d}  loss {losses[-1]:.4f}")
            manager.save(first + args.steps, args=ocp.args.StandardSave({"params": params, "state": state}))
            manager.wait_until_finished()
    return losses


if __name__ == "__main__":
    main()
