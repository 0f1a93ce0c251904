"""Folders that are whole or not there: how checkpoints reach the disk, and how they are trusted again.

    parent/.writing-step-000123/     files written and fsynced;
                                     manifest.json (every file's size and sha256), written and fsynced last
        -- one rename --> parent/step-000123/, then fsync of the parent, then the oldest beyond `keep` are removed,
                                     each renamed to .removing-... first

A kill at any moment therefore leaves every folder named `step-...` whole. Reading takes nothing on trust: the manifest
has to be the very bytes that were written, name every file of the folder and no other, and fit each one's size and
sha256, before anything is parsed. No links, no folders inside, no name that leads elsewhere. Knows nothing of tensors.
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

MANIFEST = "manifest.json"
FORMAT = "orthoshard checkpoint 1"
_STEP = re.compile(r"step-(\d{6,})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Damaged(Exception):
    """Why a folder cannot be trusted; the text continues "the checkpoint X ..."."""


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def steps(parent: Path) -> list[int]:
    """The steps that ``parent`` holds a folder of, whole or damaged, in order."""
    if not parent.is_dir():
        return []
    found = [_STEP.fullmatch(entry.name) for entry in parent.iterdir()]
    return sorted(int(match[1]) for match in found if match)


def write(parent: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Make ``parent/step-...`` of the files that ``fill`` writes into the empty folder it is given.

    Raises whatever ``fill`` or the system raises; then nothing new is there, and everything old still is.
    """
    temporary = begin(parent, step)
    try:
        fill(temporary)
        return commit(parent, step, keep)
    except BaseException:  # torch's CheckpointException is no Exception
        abandon(parent, step)
        raise


def begin(parent: Path, step: int) -> Path:
    """The empty folder to fill; `commit` or `abandon` has to follow. The three are `write` for several writers."""
    if (parent / name_of(step)).exists():
        raise FileExistsError(f"{parent / name_of(step)} is already there")
    _clear(parent)
    temporary = parent / f".writing-{name_of(step)}"
    temporary.mkdir()
    return temporary


def abandon(parent: Path, step: int) -> None:
    """Remove what `begin` made."""
    shutil.rmtree(parent / f".writing-{name_of(step)}", ignore_errors=True)


def commit(parent: Path, step: int, keep: int) -> Path:
    """Seal the filled folder, give it its name, and remove the oldest beyond ``keep``."""
    target, temporary = parent / name_of(step), parent / f".writing-{name_of(step)}"
    seal(temporary, step)
    os.rename(temporary, target)
    _sync(parent)
    for old in steps(parent)[:-keep]:
        doomed = parent / f".removing-{name_of(old)}"
        os.rename(parent / name_of(old), doomed)
        shutil.rmtree(doomed)
    return target


def seal(folder: Path, step: int) -> None:
    """Fsync every file of ``folder`` and write the manifest that vouches for them."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / MANIFEST).open("wb") as file:
        file.write(_manifest_bytes({"format": FORMAT, "step": step, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def verify(folder: Path, step: int) -> list[Path]:
    """The files of a folder that is what was written, to the bit. Raises ``Damaged``."""
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("is not a folder of its own")
    entries = {entry.name: entry for entry in os.scandir(folder)}
    if MANIFEST not in entries:
        raise Damaged(f"has no {MANIFEST}, so orthoshard did not write it, or not all of it is here")
    for entry in entries.values():
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise Damaged(f"holds {entry.name!r}, which is a link or a folder, where only plain files belong")
    manifest = _read_manifest(folder / MANIFEST)
    if manifest["step"] != step:
        raise Damaged(f"says it is of step {manifest['step']}")
    listed = manifest["files"]
    for name in listed:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise Damaged(f"names the file {name!r}, which would lie outside it")
    missing, extra = sorted(set(listed) - set(entries)), sorted(set(entries) - set(listed) - {MANIFEST})
    if missing:
        raise Damaged(f"lacks its file {missing[0]!r}")
    if extra:
        raise Damaged(f"holds {extra[0]!r}, which its manifest does not name")
    for name, facts in listed.items():
        size = (folder / name).stat().st_size
        if size != facts["bytes"]:
            raise Damaged(f"has {size} bytes in {name!r} instead of {facts['bytes']}")
    for name, facts in listed.items():
        if _sha256(folder / name) != facts["sha256"]:
            raise Damaged(f"has changed bytes in {name!r} (its sha256 is not the one recorded)")
    return [folder / name for name in listed]


def set_aside(parent: Path, after: int) -> list[Path]:
    """Rename the folders of later steps than ``after``, so that they are kept but no longer count."""
    moved: list[Path] = []
    for step in steps(parent):
        if step > after:
            number = 1
            while (aside := parent / f"set-aside-{number}-{name_of(step)}").exists():
                number += 1
            os.rename(parent / name_of(step), aside)
            moved.append(aside)
    return moved


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        files = manifest["files"]
        shaped = (
            isinstance(manifest["step"], int)
            and all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
            and _manifest_bytes(manifest) == raw
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"has a {MANIFEST} that cannot be read") from error
    if manifest.get("format") != FORMAT:
        raise Damaged(f"is in the format {manifest.get('format')!r}, and this version reads {FORMAT!r}")
    if not shaped:
        raise Damaged(f"has a {MANIFEST} that is not as it was written")
    return manifest


def _clear(parent: Path) -> None:
    """Remove what an interrupted write or removal left."""
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
