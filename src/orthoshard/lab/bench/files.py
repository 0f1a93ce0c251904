"""Result files. That a file can be written is checked before the work; it is then replaced completely or not at all.

May import the standard library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def claim(path: Path, flag: str = "--out", inputs: Sequence[Path] = ()) -> None:
    """Check, before any work, that ``path`` can be written and is none of ``inputs``. Raises ValueError."""
    if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
        raise ValueError(f"{flag} {path} is one of the input files: give {flag} another file.")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file in it, such as {path / 'bench.json'}.")
    probe = _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"Nothing can be written to {path.parent} ({why}): give {flag} another folder.") from None


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``, completely or not at all."""
    draft = _draft(path)
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:  # does not name the file if the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write ``value`` to ``path``. Raises ValueError for numbers that are not finite, which JSON does not have."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def size(count: float | None) -> str:
    """Return a number of bytes with its unit, such as 339.7 MB, or an empty text for None."""
    if count is None:
        return ""
    if count < 1000:
        return f"{count:.0f} B"
    for unit, factor in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if count < 1000 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e12:.1f} TB"


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
