"""Eight simulated devices, and a compiler in a hurry: the programs here run once."""

# ruff: noqa: E402
import os
import sys
from pathlib import Path

# Read when the first array is made, not at import. Compiling takes a quarter of the time.
HURRY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HURRY}"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
sys.path.append(str(Path(__file__).parent.parent / "linalg"))  # cases.py


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Both dtypes, float64 where JAX is told to have it."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param
