"""Compiles every kernel as its launcher asks for it, where no GPU is: a JSON line for each.

    python tests/kernels/compile_for.py 90 aligned       compute capability 9.0, matrices that lie in whole vectors
    python tests/kernels/compile_for.py 80 odd           8.0, odd rows, columns and rank

Triton needs a driver only to ask which GPU there is, so that a driver which answers "an H200" is enough to compile; its
`ptxas` then tells what a kernel takes of a multiprocessor. Launchers run as they are, on CPU tensors, up to the launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from passes import Maker, Shape
from triton.backends.compiler import GPUTarget

from orthoshard.kernels import add, ahead, copy, sweep
from orthoshard.linalg.accumulate import Product
from orthoshard.linalg.found_inf import FoundInf
from orthoshard.linalg.rounding import Stochastic, places

CAPABILITY, LENGTHS = int(sys.argv[1]), sys.argv[2]
SHAPE = {"aligned": Shape((1, 1), 256, 256, 128), "odd": Shape((1, 1), 255, 261, 100)}[LENGTHS]
ARCHITECTURE = f"sm_{CAPABILITY}" + ("a" if CAPABILITY >= 90 else "")
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class Driver:
    """What compiling asks of a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)


def compiled(kernel, programs, *arguments, **constants):
    result = kernel.warmup(*arguments, grid=(programs,), **constants)
    ptx = result.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", f"-arch={ARCHITECTURE}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    row = {
        "kernel": kernel.__name__,
        "case": case,
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spilled": int(re.search(r"(\d+) bytes spill stores", report).group(1)),
        "shared": result.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\.[\w.]*v[24]|cp\.async\.cg", ptx)),
        "tensor_core": len(re.findall(r"wgmma\.mma|mma\.sync", ptx)),
    }
    print(json.dumps(row), flush=True)


triton.runtime.driver.set_active(Driver())
for module in (add, ahead, copy, sweep):
    module.launch = compiled
    module.check = lambda *_: None

for case in ("float32", "bfloat16 weights", "captured", "float64", "bfloat16"):
    make = Maker(SHAPE, "bfloat16 weights" if case == "captured" else case, device="cpu")
    skip = FoundInf.where(torch.tensor(False)) if case == "captured" else None
    M, G, W = make.momentum(), make.blocks(make.gradient), make.blocks(make.weight)
    Q, P = make.factor(SHAPE.m), make.factor(SHAPE.n)
    rows, a = torch.ones(2, SHAPE.m, 1), torch.ones(2, 1, 1, dtype=M.dtype)
    sweep.accumulate(M, G, 0.9, skip)
    if case != "bfloat16":  # what is left differs in dtypes alone, and takes long
        for precision in (None, "tf32"):
            add.add_product_and_rows(W, Q, P, rows, M, -0.1, 0.9, precision)
        add.add_scaled(W, M, -0.1, 0.9, None, skip)
        ahead.look_back([M[:1], M[1:]], G, 0.9, skip)
        copy.scaled_copy(M, a, torch.float16)
        copy.wide_row_squares(M)
    ahead.look_ahead(M, G, 0.9, skip)
    add.add_products(M, Product(Q, P, -0.1, a), W, Product(Q, P, -0.1), 0.9, "tf32", None, skip)
    if make.weight == torch.bfloat16 and skip is None:
        key = torch.ones(1, dtype=torch.int64, device=W[0].device)
        pairs = [places(w.shape, [(0, n) for n in w.shape], key, 0) for w in W]
        rounding = [Stochastic(rows[0], columns[0]) for rows, columns in pairs]
        add.add_scaled(W, M, -0.1, 0.9, rounding)
