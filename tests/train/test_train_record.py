"""run.jsonl: one line an event, torn ends survive, cutting never touches what came before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orthoshard.lab.train import record
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.plot import plot_loss, running_mean
from orthoshard.lab.train.record import Record

EVENTS = [
    {"kind": "run", "step": 0},
    {"kind": "step", "step": 1, "loss": 0.1 + 0.2},
    {"kind": "step", "step": 2, "loss": 1e-300},
    {"kind": "checkpoint", "step": 2},
    {"kind": "step", "step": 3, "loss": 3.0},
    {"kind": "validation", "step": 3, "loss": 3.5},
]


def written(folder: Path) -> bytes:
    lines = Record(folder, new=True)
    for event in EVENTS:
        lines(event)
    lines.close()
    return (folder / record.NAME).read_bytes()


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    assert len(written(tmp_path).splitlines()) == 6
    assert record.read(tmp_path) == EVENTS


def test_not_finite_is_null(tmp_path: Path) -> None:
    lines = Record(tmp_path, new=True)
    lines({"kind": "validation", "step": 1, "loss": float("nan"), "norm": float("inf")})
    assert json.loads((tmp_path / record.NAME).read_text()) == {
        "kind": "validation", "step": 1, "loss": None, "norm": None,
    }  # fmt: skip
    assert record.validations(record.read(tmp_path)) == [(1, float("inf"))]


def test_every_torn_end_is_survived(tmp_path: Path) -> None:
    """Cut at every byte: what is read is every whole line, and cutting back to step 2 keeps exactly those before it."""
    whole = written(tmp_path)
    until_2 = b"".join(line + b"\n" for line in whole.splitlines()[:4])
    for length in range(len(whole) + 1):
        (tmp_path / record.NAME).write_bytes(whole[:length])
        assert record.read(tmp_path) == EVENTS[: whole[:length].count(b"\n")]
        kept = record.cut(tmp_path, 2)
        assert kept == EVENTS[: min(4, whole[:length].count(b"\n"))]
        after = (tmp_path / record.NAME).read_bytes()
        assert until_2.startswith(after)
        assert len(after) == min(len(until_2), whole[:length].rfind(b"\n") + 1)


def test_zeros_after_a_power_loss(tmp_path: Path) -> None:
    whole = written(tmp_path)
    (tmp_path / record.NAME).write_bytes(whole + bytes(200))
    assert record.cut(tmp_path, 3) == EVENTS
    assert (tmp_path / record.NAME).read_bytes() == whole


def test_an_edited_record_is_refused_and_left_alone(tmp_path: Path) -> None:
    broken = written(tmp_path).replace(b'{"kind": "checkpoint"', b"{'kind': 'checkpoint'")
    (tmp_path / record.NAME).write_bytes(broken)
    with pytest.raises(UserError, match=r"line 4 of .* is not JSON"):
        record.cut(tmp_path, 2)
    assert (tmp_path / record.NAME).read_bytes() == broken


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    before = written(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        Record(tmp_path, new=True)
    assert (tmp_path / record.NAME).read_bytes() == before


def test_lines_go_to_the_end_of_a_file_that_was_cut(tmp_path: Path) -> None:
    lines = Record(tmp_path, new=True)
    for event in EVENTS:
        lines(event)
    assert record.cut(tmp_path, 2) == EVENTS[:4]
    lines(EVENTS[4])
    assert record.read(tmp_path) == EVENTS[:5]


def test_running_mean_is_unbiased() -> None:
    assert running_mean([2.0] * 5, span=4) == [2.0] * 5
    assert running_mean([1.0, 3.0], span=2) == [1.0, pytest.approx((0.5 * 1 + 3) / 1.5)]


def test_plot_of_any_record(tmp_path: Path) -> None:
    """Also of one with nothing, with skipped steps and with losses that were not finite."""
    skipped = {"kind": "step", "step": 4, "loss": None, "skipped": True}
    full = [{**event, "skipped": False} for event in EVENTS if event["kind"] != "run"] + [skipped]
    for number, events in enumerate(([], full)):
        plot_loss(events, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
