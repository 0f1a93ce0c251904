"""A comparison under torchrun: each run is trained by all ranks together.

Rank 0 compares, as in one process. When it starts a worker it tells every rank, and each rank starts one too. The
workers of one run meet at their own port, so that a run that fails does not affect the others. May import
``orthoshard.lab.train`` and `orthoshard.lab.compare.pool`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthoshard.lab.compare.pool import Start, Worker, start_process
from orthoshard.lab.train.torchrun import Torchrun


def starter(torchrun: Torchrun) -> Start:
    """Return `start_process` for all ranks, to be called on rank 0."""

    def start(folder: Path, keep_open: Sequence[int] = ()) -> Worker:
        port = _free_port()
        torchrun.control.tell((str(folder), port))
        return start_process(folder, keep_open, _environment(port))

    return start


def serve(torchrun: Torchrun) -> None:
    """Start this rank's worker of each run, until `dismiss`. Called on every rank except 0."""
    nothing: Any = None
    while (order := torchrun.control.tell(nothing)) is not None:
        folder, port = order
        worker = start_process(Path(folder), (), _environment(port))
        try:
            worker.wait()
        except BaseException:  # told to end: the worker must not stay
            worker.kill()
            raise


def dismiss(torchrun: Torchrun) -> None:
    """End `serve` on the other ranks. Called on rank 0."""
    torchrun.control.tell(None)


def _environment(port: int) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return kept | {"MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
