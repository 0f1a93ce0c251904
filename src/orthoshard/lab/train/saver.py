"""One checkpoint at a time. Many ranks write it beside the training: the step that asks for it waits for copies on the
CPU alone. One process, whose state is not copied, writes it between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException


@dataclass(frozen=True)
class Saved:
    step: int
    folder: Path
    seconds: float
    """From the request until it is on the disk."""


class Saver:
    def __init__(self) -> None:
        self.step = 0
        """Of the checkpoint begun last."""
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._error: BaseException | None = None

    def start(self, step: int, write: Callable[[], Path], beside: bool) -> None:
        """Begin ``write``, or do it here and now; the one before must have been waited for."""
        assert self._thread is None
        self.step = step
        begun = time.perf_counter()

        def body() -> None:
            try:
                folder = write()
                self._saved = Saved(step, folder, time.perf_counter() - begun)
            except (Exception, CheckpointException) as error:
                self._error = error

        if not beside:
            body()
            return
        # A daemon: where another rank is gone, this process must be able to end.
        self._thread = threading.Thread(target=body, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    def wait(self) -> Saved | None:
        """What has been written since the last call, if anything was begun. Raises what kept it from being written."""
        if self._thread is not None:
            self._thread.join()
        saved, error = self._saved, self._error
        self._thread = self._saved = self._error = None
        if error is not None:
            raise error
        return saved
