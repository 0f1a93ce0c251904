"""The flags of ``orthoshard bench``, as tyro reads them.

May import the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class BenchConfig:
    """Time one optimizer step on the matrices of a named model, beside the step's floor and torch's optimizers.

    Contestants: `dion-R` and `dion-tail-R` at each rank fraction R, `muon`, `adamw-fused`, `torch-muon`, and the floors
    `floor-dion-R`, `floor-dion-tail-R` and `floor-muon`: the matrix products of the step and one accumulation, alone.
    By name in `--only` also `normuon`, `dion3` and `row-norm`. They step in turn, in one process. The table shows
    medians and their ratios; the file holds every time."""

    model: str = "gpt2-small"
    """Whose matrices: `--list` shows the names."""
    layers: int = 0
    """How many of its layers; 0: all."""
    ranks: tuple[str, ...] = ()
    """Rank fractions of Dion, such as `1 1/4 0.0625`; by default `1 1/4 1/16`, with `--replicas` only `1/16`."""
    only: tuple[str, ...] = ()
    """Which contestants to time: names, or patterns such as `dion-1/4`, `'*1/16'`, `'floor-*'`. Each holds its own
    weights and state, so fewer need less memory."""
    plugin: str | None = None
    """A Python module that is imported first: the rules that it registers are contestants by their names, at each rank
    if they have one. Not with `--processes`, `--owners` and `--replicas`, which time our own."""
    rounds: int | None = None
    """Steps of every contestant; by default as many as fit into `--seconds`, and at least 3."""
    seconds: float = 120.0
    """Time for the rounds. First steps and memory are measured outside of it."""
    limit: float = 60.0
    """Seconds for the first steps of a contestant: who takes longer is left out of the rounds, and named. 0: none."""
    stages: bool = False
    """Instead, where the time of a step goes: survey, accumulation, products, orthonormalization, error feedback,
    weights, for each of our rules that is chosen."""
    compare: tuple[Path, ...] = ()
    """OLD.json: after the run, its ratios beside those of an earlier one. OLD.json NEW.json: two files, no run."""
    state_dtype: Literal["bfloat16", "int8"] | None = None
    """Also contestants whose state is of this dtype: `dion-bf16-R`, `dion-tail-bf16-R`, `muon-bf16` and their floors;
    or `dion-int8-R`, `dion-tail-int8-R`, `muon-int8`. They also come by name in `--only`."""
    kernels: Literal["torch", "triton"] | None = None
    """Also contestants whose passes over memory are torch's alone, `dion-torch-R`, `dion-tail-torch-R`, `muon-torch`,
    or Triton's wherever there is one, `dion-triton-R`, ... (CUDA only), to be compared with their rows without. They
    also come by name in `--only`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of weights and gradients."""
    spectrum: Literal["flat", "falling"] = "flat"
    """Singular values of the random gradients: those of Gaussian matrices, or falling about as 1/k."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 products on a GPU: `high` allows TF32."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    processes: int = 0
    """With 2 or more: instead, the steps of Dion at each rank and of Muon with every matrix cut by rows over
    so many gloo processes of one thread, beside the one-process step and the collectives alone. CPU only."""
    replicas: int = 0
    """With 2 or more: instead, so many replicas with gradients of their own, each in a network namespace, exchange
    gradients or the factors of Dion, at each of `--bandwidths`; beside what the bytes predict. Linux, as root."""
    owners: int = 0
    """With 2 or more: instead, the steps of so many replicas (gloo, one thread each) that each keep all state of Dion
    at each rank and of Muon, or that of their own matrices only: times, bytes sent and state. CPU only."""
    bandwidths: tuple[float, ...] = (100, 300, 1000, 3000, 10000)
    """Mbit/s of every replica, each way, with `--replicas`; `--seconds` are shared out over them."""
    first_steps: int = 3
    """Fresh optimizers whose first step is timed; 0: none."""
    self_test: bool = False
    """Instead, whether this device computes what float64 on a CPU does: a table of checks, exit code 1 where one
    fails. `--only` names sections of it, such as `correct graphs`. Under torchrun also over its processes."""
    skip_peak: bool = False
    """Leave out the memory that one step needs for a moment."""
    seed: int = 0
    """Seed of the random matrices and of the order within a round."""
    out: Path | None = None
    """The JSON file; by default `runs/bench/<model>-<device>-<dtype>.json`,
    or `-<N>-processes`, `-<N>-owners`, `-slow-link`, `-stages`; where there is a plot it stands beside it, of the same
    name and `.png`. Of the self-test: `runs/bench/self-test-<device>.json`."""
    list: bool = False
    """Show the models and the contestants, and time nothing."""
