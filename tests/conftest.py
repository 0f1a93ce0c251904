"""Common ground of all tests: one thread a worker, since several workers share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
