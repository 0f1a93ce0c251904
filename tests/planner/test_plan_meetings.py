"""What is measured of collectives, by a clock that only the test moves; and whose processor time is whose."""

from __future__ import annotations

import time

import pytest

from orthoshard.engine.comm import Comm, Pending
from orthoshard.lab.bench import busy
from orthoshard.lab.plan.meetings import EXCHANGES, meetings
from orthoshard.layout import Axis

LATE, RATE, PRODUCT = 3e-3, 1e8, 5e-3  # seconds, bytes a second, seconds
SIZES = (2**8, 2**12, 2**16)


class Clock:
    """Time passes by work and by collectives; in a collective all wait for the last rank, and then send."""

    def __init__(self, ranks):
        self.now, self.sent, self.products = 0.0, [], 0
        self.axis = Axis(("ranks",), "ranks", ranks, 0)

    def timed(self, call):
        start = self.now
        call()
        return self.now - start

    def work(self):
        self.now += PRODUCT
        self.products += 1

    def all_to_all(self, comm, out, x, receive, send, axis):
        return self.sends(comm, out, x.numel() - send[axis.coordinate])

    def all_gather(self, comm, out, x, axis):
        return self.sends(comm, out, out.numel() - x.numel())

    def sends(self, comm, out, entries):
        comm._count(4 * entries)
        self.sent.append(comm.bytes)
        comm.bytes = 0
        self.now += LATE + self.sent[-1] / RATE
        out.fill_(1.0)
        return Pending(None, "")


@pytest.mark.parametrize("ranks", [2, 4])
def test_products_are_taken_off_and_waiting_stays(ranks, monkeypatch):
    clock = Clock(ranks)
    monkeypatch.setattr(Comm, "all_to_all", lambda comm, *arguments: clock.all_to_all(comm, *arguments))
    monkeypatch.setattr(Comm, "all_gather", lambda comm, *arguments: clock.all_gather(comm, *arguments))
    found = meetings(SIZES, clock.axis, clock.work, clock.timed)
    assert [size for size, _ in found] == [4 * entries * (ranks - 1) / ranks for entries in SIZES]
    assert set(clock.sent) == {size for size, _ in found}, "half go to owners and half to all, of the same bytes"
    for size, seconds in found:
        assert seconds == pytest.approx(LATE + size / RATE)
    assert clock.products % EXCHANGES == 0


def test_noise_is_no_gain():
    """Where products took longer alone than with exchanges, a collective costs nothing."""
    clock, steps = Clock(2), iter(range(10**6))
    found = meetings(SIZES[:1], clock.axis, lambda: None, lambda call: float(next(steps)) ** 2)
    assert found[0][1] == 0.0


def test_others_are_who_is_neither_idle_nor_us(monkeypatch, tmp_path):
    """Ten seconds of two processors: 6 idle, 1 waiting for a disk, 13 busy, of which 3 are ours."""
    stat, ours = tmp_path / "stat", iter((100.0, 103.0))
    monkeypatch.setattr(busy, "STAT", stat)
    monkeypatch.setattr(busy.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(busy, "_ours", lambda: next(ours))
    stat.write_text("cpu  1000 50 200 4000 10 5 5 0 7 7\ncpu0 1 2 3\n")
    share = busy.others_since()
    stat.write_text("cpu  1900 150 400 4600 110 55 55 0 7 7\ncpu0 1 2 3\n")
    assert share() == pytest.approx((13 - 3) / 20)


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "STAT", tmp_path / "nowhere")
    assert busy.others_since()() is None


def test_our_own_time_is_not_that_of_others():
    """Where the system tells: a second of ours is in `_ours`."""
    before, start = busy._ours(), time.process_time()
    while time.process_time() - start < 0.1:
        pass
    assert busy._ours() - before == pytest.approx(0.1, abs=0.05)
