"""One optimizer step under JAX on the matrices of GPT-2-small (12 layers, 84.9 M entries, float32), as JSON.

    python experiments/jax/step_time.py --out benchmarks/results/jax-gpt2-small-cpu.json --rounds 7

Optimizers alternate, one step each a round, after one that compiles; medians of wall-clock and of processor time (all
threads), which a busy machine disturbs less, and ratios of the latter to optax.adamw's in the same round. A step is
`update` and `apply_updates`, jitted, state and parameters donated. A step that is traced again is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from orthoshard.jax import dion, dion_tail, muon

SHAPES = {"attention": (768, 2304), "projection": (768, 768), "up": (768, 3072), "down": (3072, 768)}  # (in, out)
OPTIMIZERS = {
    "optax.adamw": lambda: optax.adamw(3e-3),
    "dion 1/4": lambda: dion(0.02, rank_fraction=1 / 4),
    "dion 1/16": lambda: dion(0.02, rank_fraction=1 / 16),
    "dion_tail 1/4": lambda: dion_tail(0.02, rank_fraction=1 / 4),
    "dion_tail 1/16": lambda: dion_tail(0.02, rank_fraction=1 / 16),
    "muon": lambda: muon(0.02),
    "optax.contrib.muon": lambda: optax.contrib.muon(0.02),
}


class Run:
    """One optimizer with its parameters, and the seconds of its steps."""

    def __init__(self, optimizer: optax.GradientTransformation, layers: int) -> None:
        key = jax.random.key(0)
        self.params = {
            f"layer{layer}.{name}": jax.random.normal(jax.random.fold_in(key, layer), shape) / 30
            for layer in range(layers)
            for name, shape in SHAPES.items()
        }
        self.state = optimizer.init(self.params)
        self.traces = 0
        self.seconds: list[float] = []
        self.processor: list[float] = []

        def step(params, state, gradients):
            self.traces += 1
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.compiled = jax.jit(step, donate_argnums=(0, 1))

    def step(self, number: int) -> None:
        keys = jax.random.split(jax.random.key(number + 1), len(self.params))
        gradients = {
            name: jax.random.normal(k, p.shape) for k, (name, p) in zip(keys, self.params.items(), strict=True)
        }
        jax.block_until_ready(gradients)
        start, busy = time.perf_counter(), time.process_time()
        self.params, self.state = self.compiled(self.params, self.state, gradients)
        jax.block_until_ready(self.params)
        self.seconds.append(time.perf_counter() - start)
        self.processor.append(time.process_time() - busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    runs = {name: Run(make(), args.layers) for name, make in OPTIMIZERS.items()}
    loads = []
    for number in range(args.rounds + 1):  # the first compiles
        loads.append(os.getloadavg()[0])
        for run in runs.values():
            run.step(number)
    assert all(run.traces == 1 for run in runs.values()), "a step was traced again"
    rows = {}
    for name, run in runs.items():
        timed = run.seconds[1:]
        ratios = [a / b for a, b in zip(run.processor[1:], runs["optax.adamw"].processor[1:], strict=True)]
        rows[name] = {
            "ms": [round(1000 * s, 1) for s in timed],
            "median_ms": round(1000 * statistics.median(timed), 1),
            "median_cpu_ms": round(1000 * statistics.median(run.processor[1:]), 1),
            "cpu_over_adamw": round(statistics.median(ratios), 3),
            "first_s": round(run.seconds[0], 2),
            "traces": run.traces,
        }
    environment = {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load": loads,
        "layers": args.layers,
        "shapes": SHAPES,
        "dtype": str(jnp.float32.dtype),
    }
    args.out.write_text(json.dumps({"environment": environment, "steps": rows}, indent=1) + "\n")
    for name, row in rows.items():
        wall, busy, ratio = row["median_ms"], row["median_cpu_ms"], row["cpu_over_adamw"]
        print(f"{name:20s} {wall:9.1f} ms {busy:9.1f} ms of processors {ratio:8.2f} x adamw")


if __name__ == "__main__":
    main()
