"""What the tests of `train` share: a small text, settings of a run of milliseconds a step, and a few readers."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orthoshard.lab.train import cli
from orthoshard.lab.train.config import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    OptimizerConfig,
    RecordConfig,
    ScheduleConfig,
    TrainConfig,
)


def write_text(path: Path, words: int = 8000, seed: int = 0) -> Path:
    """Text with something to learn in it: 200 words, the common ones far more often than the rare ones."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    chosen = rng.choices(known, weights=[1 / (1 + i) for i in range(200)], k=words)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(chosen) + "\n")
    return path


def tiny_config(
    text: Path,
    *,
    steps: int = 6,
    batch: int = 2,
    accumulate: int = 1,
    checkpoint_every: int = 2,
    validate_every: int = 3,
    vocabulary: int = 300,
    max_skipped: int = 3,
    optimizer: OptimizerConfig | None = None,
    clip: float = 1.0,
) -> TrainConfig:
    """nano (two layers of width 64), context 16, Dion, one thread; data cached beside the text."""
    return TrainConfig(
        data=DataConfig(corpus=f"text:{text}", vocabulary=vocabulary, cache=text.parent / "cache"),
        model=ModelConfig("nano", context=16),
        optimizer=optimizer or OptimizerConfig("dion", rank_fraction=0.25),
        schedule=ScheduleConfig(steps=steps, batch=batch, accumulate=accumulate, warmup=2, clip=clip),
        record=RecordConfig(
            validate_every=validate_every, validation_batches=2, checkpoint_every=checkpoint_every, sample_tokens=8
        ),
        machine=MachineConfig(device="cpu", threads=1),
        max_skipped=max_skipped,
    )


def command(said: Path, given: list[str], **environment: object) -> None:
    """`orthoshard train` as a process of its own, forked from what is imported; what it says goes to files."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    out, err = ((said / f"{name}{os.environ.get('RANK', '')}").open("w") for name in ("out", "err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        code = cli.main(given)
    sys.exit(code)


def losses(events: list[dict[str, Any]]) -> list[float]:
    """Training and validation losses in order, every bit of them."""
    return [event["loss"] for event in events if event["kind"] in ("step", "validation")]


def tensors_sha256(checkpoint: Path) -> str:
    """Of the names and bytes of all tensors (the file's own header has no fixed order)."""
    digest = hashlib.sha256()
    (file,) = checkpoint.glob("*.safetensors")
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
