"""`orthoshard data`: fetch and prepare a corpus ahead of training. Running it again costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from orthoshard.lab.train.config import SHARE, DataConfig
from orthoshard.lab.verb import exit_code, read_flags


@dataclass(frozen=True)
class Command:
    """Fetch a text and make its tokens, so that training starts at once and needs no network."""

    corpus: Annotated[str, tyro.conf.Positional] = "shakespeare"
    """As in `orthoshard train --corpus`: shakespeare, python-source, text:PATH or bin:PATTERN."""
    vocabulary: int = DataConfig.vocabulary
    """Tokens of the byte-level BPE."""
    held_out: Annotated[float, SHARE] = DataConfig.held_out
    """Share of every document kept for validation."""
    cache: Path = DataConfig.cache
    """Where texts and tokens are kept."""


def main(argv: Sequence[str] | None = None) -> int:
    command = read_flags(Command, "orthoshard data", argv)
    return exit_code("data", lambda: _main(command))


def _main(command: Command) -> None:
    from orthoshard.lab.train.data import prepare

    settings = DataConfig(
        corpus=command.corpus, vocabulary=command.vocabulary, held_out=command.held_out, cache=command.cache
    )
    data = prepare(settings)
    train, validation = sum(map(len, data.train)), sum(map(len, data.validation))
    print(
        f"{data.name}: {train:,} tokens to train on, {validation:,} to validate on, vocabulary {data.vocabulary}, "
        f"in {command.cache}"
    )
