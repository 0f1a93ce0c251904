"""Results on disk: a file is checked before the work that fills it, and replaced whole or not at all.

May import the standard library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def claim(path: Path, flag: str = "--out", inputs: Sequence[Path] = ()) -> None:
    """Makes sure, before any work, that ``path`` can be written and is none of ``inputs``; else a ``ValueError`` says
    what to do."""
    if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
        raise ValueError(f"{flag} {path} is what is read here: give {flag} another file.")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file in it, such as {path / 'bench.json'}.")
    probe = _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"Nothing can be written to {path.parent} ({why}): give {flag} another place.") from None


def write_text(path: Path, text: str) -> None:
    draft = _draft(path)
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:  # of a full disk says no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 1) -> None:
    """Numbers that are not finite are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def size(count: float | None) -> str:
    """Bytes in the unit that leaves three digits: 339.7 MB."""
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
