"""`make release VERSION=0.2.0`: version and date wherever they stand, a commit and a tag. Pushing the tag publishes."""

import datetime
import re
import subprocess
import sys
from pathlib import Path

# file: (what stands there, what has to)
PLACES = {
    "src/orthoshard/__init__.py": (r'(?m)^__version__ = ".*"$', '__version__ = "{version}"'),
    "CITATION.cff": (r"(?m)^version: .*$", "version: {version}"),
    "CHANGELOG.md": (r"(?m)^## \S+ \(unreleased\)$", "## {version} ({date:%Y-%m-%d})"),
}


def release(version: str) -> str | None:
    """Return what keeps this from being released, or None."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", version):
        return f"VERSION={version}: give a version such as 0.2.0 or 0.2.0rc1"
    if subprocess.check_output(["git", "status", "--porcelain"], text=True):
        return "there are changes that are not committed: commit them first"
    if subprocess.check_output(["git", "tag", "--list", f"v{version}"], text=True):
        return f"there is a tag v{version} already: give the next version"
    texts = {}
    for file, (old, new) in PLACES.items():
        given = new.format(version=version, date=datetime.date.today())
        texts[file], count = re.subn(old, given, Path(file).read_text())
        if count != 1:
            return f"{file}: expected one line like {old}, found {count}"
    for file, text in texts.items():
        Path(file).write_text(text)
    subprocess.check_call(["git", "commit", "-qam", f"Release {version}"])
    subprocess.check_call(["git", "tag", "-am", f"orthoshard {version}", f"v{version}"])
    print(f"v{version} is committed and tagged; `git push origin main v{version}` starts its release")
    return None


if __name__ == "__main__":
    sys.exit(release(sys.argv[1] if len(sys.argv) > 1 else ""))
