"""Claiming and writing result files, and sizes in words."""

import errno
import json
from pathlib import Path

import pytest

from orthoshard.lab.bench.files import claim, size, write_json, write_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (339_738_624, "339.7 MB"),
        (2_000_000_000_000, "2.0 TB"),
        (None, ""),
    ],
)
def test_size(count, text):
    assert size(count) == text


def test_a_file_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path):
    with pytest.raises(ValueError, match="is a folder"):
        claim(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Nothing can be written"):
        claim(tmp_path / "file" / "bench.json")
    with pytest.raises(ValueError, match="is one of the input files"):
        claim(tmp_path / "file", inputs=[tmp_path / "gone", tmp_path / "." / "file"])
    claim(tmp_path / "new" / "bench.json")
    assert list((tmp_path / "new").iterdir()) == [], "the probe stays behind"


def test_writing_replaces_the_whole_file(tmp_path: Path):
    path = tmp_path / "bench.json"
    path.write_text("old")
    write_json(path, {"new": [1, 2]})
    assert json.loads(path.read_text()) == {"new": [1, 2]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"new": [1, 2]}, "a value that JSON cannot hold destroyed the file"


def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(draft: Path, text: str, **_: object) -> None:
        draft.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_text(tmp_path / "plan.json", "{}")
    assert caught.value.filename == str(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []
