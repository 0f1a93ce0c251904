"""What `make release` writes, in a copy of the files that it changes."""

from __future__ import annotations

import datetime
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import orthoshard

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / ".ci/release.py"))


def git(*words):
    return subprocess.check_output(["git", *words], text=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in SCRIPT["PLACES"]:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, file)
    changes = Path("CHANGELOG.md")  # a release just made has none that are unreleased
    changes.write_text(re.sub(r"(?m)^## .*$", "## 7.0.0 (unreleased)", changes.read_text(), count=1))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A person")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "Before")


@pytest.mark.parametrize("version", ["7.0.0", "7.1.0rc2"])
def test_version_and_date_wherever_they_stand(checkout, version):
    assert SCRIPT["release"](version) is None
    assert git("describe", "--exact-match").strip() == f"v{version}"
    assert not git("status", "--porcelain")
    added = re.findall(r"^\+(?!\+)(.*)$", git("show", "-U0"), re.MULTILINE)
    day = datetime.date.today().isoformat()
    assert sorted(added) == [f"## {version} ({day})", f'__version__ = "{version}"', f"version: {version}"]


def test_what_keeps_a_release_back(checkout):
    release = SCRIPT["release"]
    assert "give a version such as" in release("seven")
    Path("CITATION.cff").write_text("")
    assert "commit them first" in release("7.0.0")
    git("commit", "-qam", "No version")
    assert "CITATION.cff: expected one line" in release("7.0.0")
    assert not git("tag")
    git("tag", "v7.0.0")
    assert "there is a tag v7.0.0 already" in release("7.0.0")


def test_the_citation_has_the_version_of_the_package():
    assert re.findall(r"(?m)^version: (.*)$", (ROOT / "CITATION.cff").read_text()) == [orthoshard.__version__]
