"""Kill a run at any moment, resume it, and the weights at the end are those of the run that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kill_runs import main

from processes import forkserver


def facts(folder: Path, *how: str | int) -> dict[str, int]:
    process = forkserver().Process(target=main, args=(folder, *how))
    process.start()
    process.join()
    assert process.exitcode == 0
    result: dict[str, int] = json.loads((folder / "facts.json").read_text())
    return result


def check_random(found: dict[str, int], resumes: int) -> None:
    assert found["resumes"] >= resumes
    assert found["kills"] >= found["resumes"]
    assert found["equal"] == found["runs"] > 0


def test_five_kills(tmp_path: Path) -> None:
    check_random(facts(tmp_path, "random", 5, 1), resumes=5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_kills(tmp_path: Path) -> None:
    found = facts(tmp_path, "random", 200, 2)
    check_random(found, resumes=200)
    assert found["while_writing"] > 20  # kills that left a half-written or half-removed checkpoint behind


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_every_file_event(tmp_path: Path) -> None:
    found = facts(tmp_path, "events", 1)
    assert found["kills"] > 40
    assert found["equal"] == found["runs"] == found["kills"] + 1
    assert found["while_writing"] > 20


def test_a_kill_at_some_file_events(tmp_path: Path) -> None:
    found = facts(tmp_path, "events", 15)
    assert found["equal"] == found["runs"] == found["kills"] + 1
