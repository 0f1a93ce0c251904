"""What the examples share: a Llama of 50 thousand parameters from transformers, and real text for it, byte by byte.

Which bytes a step sees is a function of step and rank alone, so a loop that knows its step goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, LENGTH = 8, 32
TEXT = Path(argparse.__file__).read_bytes()  # 100 kB of text that every machine with Python has


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def row(number: int) -> Tensor:
    """Return one stretch of the text, (LENGTH,)."""
    start = number * LENGTH % (len(TEXT) - LENGTH)
    return torch.tensor(list(TEXT[start : start + LENGTH]))


def batch(step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """Return the tokens that a rank sees in a step, (ROWS, LENGTH)."""
    first = (step * ranks + rank) * ROWS
    return torch.stack([row(first + number) for number in range(ROWS)])


class Rows(torch.utils.data.Dataset):
    """The same text for hosts that bring their own data loaders."""

    def __len__(self) -> int:
        return len(TEXT) // LENGTH

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": row(number), "labels": row(number)}


def report(step: int, loss: float) -> None:
    print(f"step {step} loss {loss:.4f}", flush=True)


def arguments(doc: str, argv: list[str] | None, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="checkpoints; a run found here goes on")
    parser.add_argument("--steps", type=int, default=50)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(argv)
