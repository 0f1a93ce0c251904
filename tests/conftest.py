"""Common ground of all tests: one thread a worker, since several workers share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

# Triton's kernels run in its interpreter where there is no GPU, which is settled when Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
