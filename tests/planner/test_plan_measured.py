"""What a measured machine does with thin products and with short messages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orthoshard.planner.hardware import find


def test_rates_between_what_was_measured_go_by_logarithms():
    h100 = find("h100")
    assert h100.at(1 / 16, 1e3) == h100.machine, "a catalogue's machine has one rate"
    slow = replace(h100, thin=h100.machine.factors / 4, links=((1e3, 1e6), (1e5, 1e8)))
    assert slow.at(1 / 4).factors == h100.machine.factors
    assert slow.at(1 / 8).factors == pytest.approx(h100.machine.factors / 2)
    assert slow.at(1 / 64).factors == pytest.approx(h100.machine.factors / 4)
    assert [slow.at(1, size).intra for size in (1, 1e3, 1e5, 1e9)] == pytest.approx([1e6, 1e6, 1e8, 1e8])
    assert slow.at(1, 1e4).inter == pytest.approx(1e7)
    assert slow.at(1).intra == h100.machine.intra, "where the size of a message is not known"
