"""`orthoshard data`: download and prepare a corpus before training. A second call finds the result in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from orthoshard.lab.train.config import DataConfig
from orthoshard.lab.verb import exit_code, read_flags


@dataclass(frozen=True)
class Command(DataConfig):
    """Download a text and prepare its tokens, so that training starts at once and needs no network."""

    corpus: Annotated[str, tyro.conf.Positional] = DataConfig.corpus
    """As in `orthoshard train --corpus`: shakespeare, python-source, text:PATH or bin:PATTERN."""


def main(argv: Sequence[str] | None = None) -> int:
    command = read_flags(Command, "orthoshard data", argv)
    return exit_code("data", lambda: _main(command))


def _main(command: Command) -> None:
    from orthoshard.lab.train.data import prepare

    data = prepare(command)
    train, validation = sum(map(len, data.train)), sum(map(len, data.validation))
    print(
        f"{data.name}: {train:,} tokens to train on, {validation:,} to validate on, vocabulary {data.vocabulary}, "
        f"in {command.cache}"
    )
