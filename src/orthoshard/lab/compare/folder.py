"""A folder of runs, of grids or of a search: its settings, its runs, its results, and who may write to it.

    folder/compare.json          the settings; a folder never mixes two comparisons
    folder/runs/<run>/           see `job`
    folder/results.json          settings, a row for each line of the table, and every run
    folder/.lock                 held while a process works in it

May import ``orthoshard.lab.compare``, ``orthoshard.lab.train`` and ``orthoshard.lab.bench.files``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from orthoshard.lab.bench.files import write_json
from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.job import Job, Outcome
from orthoshard.lab.compare.pool import PATIENCE_SECONDS
from orthoshard.lab.compare.table import Row
from orthoshard.lab.train.errors import UserError

SETTINGS = "compare.json"
RESULTS = "results.json"
RUNS = "runs"
LOCK = ".lock"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Folder:
    path: Path

    def run(self, job: Job) -> Path:
        return self.path / RUNS / job.folder

    def load(self, job: Job, digest: str) -> Outcome | None:
        """Return the outcome of a run, or None if it has not ended. Raises ``UserError`` if it used other data."""
        found = jobs.load(self.run(job) / jobs.RESULT)
        if found is not None and found.digest != digest:
            raise UserError(
                f"the run {job.folder} in {self.path} saw other data (digest {found.digest}; here {digest}): "
                "the text has changed since; give another folder with --out."
            )
        return found

    def read(self, make: Callable[[dict[str, Any]], Made]) -> Made:
        """Return what ``make`` returns for the settings in the folder. Raises ``UserError``."""
        path = self.path / SETTINGS
        try:
            return make(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"there is no comparison in {self.path}; start one without --report-only.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a comparison's settings ({error}); give another folder with --out."
            ) from error

    @contextmanager
    def claimed(
        self, settings: Mapping[str, Any], fixed: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> Generator[Sequence[int]]:
        """Lock the folder and write these settings. The part that ``fixed`` returns must equal that of settings already
        there; the rest may change. Yields files that workers keep open. Raises ``UserError``."""
        self._make()
        with lock(self.path) as keep_open:
            if (self.path / SETTINGS).exists():
                self._refuse_another(fixed(settings), self.read(fixed))
            write_json(self.path / SETTINGS, settings)
            yield keep_open

    def _make(self) -> None:
        try:
            (self.path / RUNS).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise UserError(
                f"nothing can be written to {self.path} ({why}); give another folder with --out."
            ) from error

    def _refuse_another(self, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
        for name, mine, theirs in differences(here, there):
            if name == "digest":
                raise UserError(f"{self.path} holds a comparison on other data; give another folder with --out.")
            raise UserError(
                f"{self.path} holds a comparison with {name} = {theirs!r}, and here it is {mine!r}; give another "
                "folder with --out, or the same settings to go on."
            )

    def write_results(
        self, about: Mapping[str, Any], made: Sequence[Row], runs: Sequence[Outcome], last: Mapping[str, Any] = {}
    ) -> None:
        rows = [_row(row) for row in made]
        found = {**about, "rows": rows, "runs": [jobs.to_json(run) for run in runs], **last}
        write_json(self.path / RESULTS, found, None)


def _row(row: Row) -> dict[str, Any]:
    """Return the row for JSON, whose keys cannot be numbers."""
    grids = {"tried": row.tried, "scalar_tried": row.scalar_tried}
    return asdict(row) | {name: [list(pair) for pair in grid.items()] for name, grid in grids.items()}


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Yield (name, value here, value there) for each difference between two nested settings."""
    for key in here:
        if isinstance(here[key], Mapping) and isinstance(there.get(key), Mapping):
            yield from differences(here[key], there[key], f"{prefix}{key}.")
        elif here[key] != there.get(key):
            yield prefix + key, here[key], there.get(key)


@contextmanager
def lock(folder: Path, patience: float = PATIENCE_SECONDS) -> Generator[list[int]]:
    """Lock a folder, so that only one comparison works in it. Workers keep the lock open too. If the parent is killed,
    it is therefore held until they have finished their step and written a checkpoint. Raises ``UserError``."""
    try:
        import fcntl
    except ImportError:  # Windows: without this protection
        yield []
        return
    with (folder / LOCK).open("ab") as file:
        begun = time.monotonic()
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > begun + patience:
                    raise UserError(f"another comparison is at work in {folder}; wait for it, or give --out.") from None
                if not said:
                    print(f"waiting for another comparison in {folder} to end")
                said = True
                time.sleep(0.2)
        yield [file.fileno()]
