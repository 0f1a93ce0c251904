"""The flags of ``orthoshard bench``, as tyro reads them.

May import the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class BenchConfig:
    """Time one optimizer step on the matrices of a model, and compare it with its floor and torch's optimizers.

    Contestants: `dion-R` and `dion-tail-R` at each rank fraction R, `muon`, `adamw-fused`, `torch-muon`, and the floors
    named `floor-dion-R`, `floor-dion-tail-R` and `floor-muon`. A floor does only the matrix products of the step and
    one accumulation. `--only` also accepts `normuon`, `dion3` and `row-norm`. The contestants take steps in turn, in
    one process. The table shows medians and their ratios; the file holds every time."""

    model: str = "auto"
    """The model whose matrices are updated; `--list` shows the names. `auto`: `gpt2-small` on a CPU, `llama-3.2-1b` on
    a GPU."""
    layers: int = 0
    """Use only this many layers of the model; 0: all."""
    ranks: tuple[str, ...] = ()
    """Rank fractions of Dion, such as `1 1/4 0.0625`. If left out: `1 1/4 1/16`; with `--replicas` only `1/16`; on a
    GPU, unless `--only` names contestants, `1/4 1/16`, or `1/16` beside other forms."""
    only: tuple[str, ...] = ()
    """Contestants to time: names, or patterns such as `dion-1/4`, `'*1/16'`, `'floor-*'`. Each contestant holds its own
    weights and state, so a shorter list needs less memory."""
    plugin: str | None = None
    """A Python module to import first. The rules that it registers become contestants under their names, at each rank
    if they have ranks. Has no effect with `--processes`, `--owners` or `--replicas`."""
    rounds: int | None = None
    """Steps of every contestant. If left out: as many as fit into `--seconds`, but at least 3; with `--replicas` 2
    to 9; with `--processes` or `--owners` 5."""
    seconds: float = 120.0
    """Time for the rounds, in seconds, without first steps and the measurement of memory."""
    limit: float = 60.0
    """Time for the first steps of a contestant, in seconds. Slower contestants are left out of the rounds, and listed
    at the end. 0: no limit."""
    stages: bool = False
    """Instead, measure how the time of a step splits into stages (gradients, accumulation, products,
    orthonormalization, error feedback, weights, rest), for the chosen contestants that are orthoshard's rules."""
    compare: tuple[Path, ...] = ()
    """OLD.json: after the run, compare its ratios with those of an earlier run. OLD.json NEW.json: compare two files,
    without a run."""
    state_dtype: Literal["bfloat16", "int8"] | None = None
    """Add contestants with state of this dtype: `dion-bf16-R`, `dion-tail-bf16-R`, `muon-bf16` and their floors; or
    (int8) `dion-int8-R`, `dion-tail-int8-R`, `muon-int8`. `--only` also accepts these names."""
    kernels: Literal["torch", "triton"] | None = None
    """Add contestants with other kernels for passes over memory, to compare with the default: only torch's
    (`dion-torch-R`, `dion-tail-torch-R`, `muon-torch`), or Triton's wherever one exists (`dion-triton-R`, ...; CUDA
    only). `--only` also accepts these names."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Dtype of weights and gradients. `auto`: float32 on a CPU, bfloat16 on a GPU."""
    spectrum: Literal["flat", "falling"] = "flat"
    """Singular values of the random gradients: those of Gaussian matrices (flat), or falling about as 1/k."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 products on a GPU: `high` allows TF32."""
    threads: int = 0
    """CPU threads; 0: torch decides."""
    processes: int = 0
    """If 2 or more: instead, time steps of Dion at each rank and of Muon with every matrix sharded by rows over so many
    gloo processes (one thread each), and compare with the one-process step plus the collectives. CPU only."""
    replicas: int = 0
    """If 2 or more: instead, time so many replicas, each with its own gradients and in its own network namespace, that
    exchange gradients or Dion's factors at each of `--bandwidths`, and compare with a prediction from the bytes sent.
    Linux only, as root."""
    owners: int = 0
    """If 2 or more: instead, compare so many replicas (gloo, one thread each) that hold all state with replicas that
    hold only the state of their own matrices, for Dion at each rank and Muon: times, bytes sent, state. CPU only."""
    bandwidths: tuple[float, ...] = (100, 300, 1000, 3000, 10000)
    """With `--replicas`: Mbit/s of every replica in each direction. `--seconds` are divided among them."""
    first_steps: int = 3
    """Number of new optimizers whose first step is timed; 0: none."""
    self_test: bool = False
    """Instead, check that this device computes the same as float64 on a CPU. Prints a table of checks; exit code 1 if
    one fails. `--only` selects sections, such as `correct graphs`. Under torchrun it also checks layouts over all
    processes."""
    skip_peak: bool = False
    """Do not measure the peak memory of a step."""
    seed: int = 0
    """Seed of the random matrices and of the order within a round."""
    out: Path | None = None
    """The JSON file. If left out: `runs/bench/<model>-<device>-<dtype>.json`, in other modes
    `runs/bench/<model>-<N>-processes.json`, `...-<N>-owners.json`, `...-slow-link.json`, `...-stages.json` or
    `runs/bench/self-test-<device>.json`. A plot has the same name, ending in `.png`."""
    list: bool = False
    """Show the names of models and contestants, and exit."""
