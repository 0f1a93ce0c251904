"""Every kernel compiles for A100 and H100, where no GPU is needed, fits into one, and spills no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that a block may take, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
SHARED = {80: 163 * 1024, 90: 227 * 1024}
KERNELS = [
    "sweep_kernel",
    "ahead_kernel",
    "back_kernel",
    "copy_kernel",
    "squares_kernel",
    "add_kernel",
    "add_two_kernel",
]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", ["aligned", "odd"])
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability, lengths, tmp_path):
    script = Path(__file__).parent / "compile_for.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, script, str(capability), lengths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for case in ("float32", "bfloat16 weights", "captured", "float64"):
        assert {row["kernel"] for row in rows if row["case"] == case} == set(KERNELS)
    for row in rows:
        assert not row["spilled"], row
        assert row["shared"] <= SHARED[capability], row
        assert row["wide_loads"] or lengths == "odd", row  # 16 bytes at a time
    products = [row for row in rows if row["kernel"] in ("add_kernel", "add_two_kernel") and row["shared"]]
    assert any(row["tensor_core"] for row in products if row["case"] == "bfloat16 weights")
    float32 = [bool(row["tensor_core"]) for row in products if row["case"] == "float32"]
    assert set(float32) == {True, False}  # TF32 where it is permitted, and nowhere else
