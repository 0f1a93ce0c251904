"""Folders that are either complete or absent: how checkpoints are written to disk, and verified before they are read.

    parent/.writing-step-000123/     files written and fsynced;
                                     manifest.json (every file's size and sha256), written and fsynced last
        -- one rename --> parent/step-000123/, then fsync of the parent; then all but the newest `keep` are removed,
                                     each renamed to .removing-... first

So every folder named `step-...` is complete, whenever the process is killed. `torch.distributed.checkpoint` does not
promise this. Before a folder is read, its files are compared with the manifest, byte for byte. This module does not
know about tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthoshard.lab.train.ranks import ControlGroup

MANIFEST = "manifest.json"
FORMAT = "orthoshard checkpoint 1"
_STEP = re.compile(r"step-(\d{6,})")


class Damaged(Exception):
    """A folder is not as it was written. The message continues a sentence that begins "the checkpoint X ..."."""


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def steps(parent: Path) -> list[int]:
    """Return the steps of all checkpoint folders in ``parent``, intact or damaged, in ascending order."""
    if not parent.is_dir():
        return []
    found = [_STEP.fullmatch(entry.name) for entry in parent.iterdir()]
    return sorted(int(match[1]) for match in found if match)


def write(
    parent: Path, step: int, fill: Callable[[Path], None], keep: int, control: ControlGroup | None = None
) -> Path:
    """Write the folder ``parent/step-...`` and return its path. Keep the newest ``keep`` folders.

    Every rank of ``control`` calls ``fill`` with an empty folder, in which it writes its files. Rank 0 does the rest.
    If ``fill`` or the system fails on any rank, all ranks raise. No new folder is left then, and all older ones remain.
    """
    control = control or ControlGroup()
    target, temporary = parent / name_of(step), parent / f".writing-{name_of(step)}"

    def begin() -> None:
        if target.exists():
            raise FileExistsError(f"{target} is already there")
        _clear(parent)
        temporary.mkdir()

    def commit() -> None:
        seal(temporary, step)
        os.rename(temporary, target)
        _sync(parent)
        for old in steps(parent)[:-keep]:
            doomed = parent / f".removing-{name_of(old)}"
            os.rename(parent / name_of(old), doomed)
            shutil.rmtree(doomed)

    control.first(begin)
    try:
        control.together(lambda: fill(temporary))
        control.first(commit)
    except BaseException:  # torch's CheckpointException is not a subclass of Exception
        if control.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def seal(folder: Path, step: int) -> None:
    """Fsync every file of ``folder``, and write the manifest with their sizes and hashes."""
    for path in folder.iterdir():
        _sync(path)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "step": step, "files": _contents(folder)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def verify(folder: Path, step: int) -> None:
    """Check that ``folder`` holds exactly the files that were written for ``step``. Raises ``Damaged`` if not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        written, of, listed = manifest["format"], manifest["step"], dict(manifest["files"])
        found = _contents(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(
            f"has no {MANIFEST} that can be read, so orthoshard did not write it, or not all of it is here"
        ) from error
    if written != FORMAT:
        raise Damaged(f"is in the format {written!r}, and this version reads {FORMAT!r}")
    if of != step:
        raise Damaged(f"says it is of step {of}")
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            raise Damaged(f"does not hold the file {name!r} as it was written")


def set_aside(parent: Path, after: int) -> list[Path]:
    """Rename the folders of steps later than ``after``, and return the new paths. They are kept but no longer found."""
    moved: list[Path] = []
    for step in steps(parent):
        if step > after:
            number = 1
            while (aside := parent / f"set-aside-{number}-{name_of(step)}").exists():
                number += 1
            os.rename(parent / name_of(step), aside)
            moved.append(aside)
    return moved


def _contents(folder: Path) -> dict[str, Any]:
    """Return size and sha256 of every file except the manifest."""
    contents: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.name != MANIFEST:
            with path.open("rb") as file:
                contents[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
    return contents


def _clear(parent: Path) -> None:
    """Create ``parent`` if needed, and remove what an interrupted write or removal has left in it."""
    parent.mkdir(parents=True, exist_ok=True)
    for entry in parent.iterdir():
        if entry.name.startswith((".writing-step-", ".removing-step-")):
            shutil.rmtree(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
