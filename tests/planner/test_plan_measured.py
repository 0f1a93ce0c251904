"""What a measured machine does with thin products and with collectives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orthoshard.lab.plan.hardware import find
from orthoshard.lab.plan.measure import MESSAGES, measure


def test_thin_products_between_what_was_measured_go_by_logarithms():
    h100 = find("h100")
    assert h100.at(1 / 16, [1e3]) == h100.machine, "a catalogue's machine has one rate"
    slow = replace(h100, thin=h100.machine.factors / 4)
    assert slow.at(1 / 4).factors == h100.machine.factors
    assert slow.at(1 / 8).factors == pytest.approx(h100.machine.factors / 2)
    assert slow.at(1 / 64).factors == pytest.approx(h100.machine.factors / 4)


def test_every_collective_costs_what_was_measured_at_its_size():
    slow = replace(find("h100"), links=((1e3, 0.5), (1e5, 1.5)))

    def seconds(*messages):
        return sum(messages) / slow.at(1, messages).intra

    assert [seconds(size) for size in (1, 1e3, 50.5e3, 1e5, 1e6)] == pytest.approx([0.5, 0.5, 1.0, 1.5, 15.0])
    assert seconds(0, 1, 1e5) == pytest.approx(0.5 + 0.5 + 1.5), "one that sends nothing is waited for as well"
    assert slow.at(1, [1e5]).inter == slow.at(1, [1e5]).intra
    assert slow.at(1).intra == find("h100").machine.intra, "where nothing is sent"


@pytest.mark.slow
def test_two_processes_measure_what_it_costs_to_meet():
    """Real gloo; figures are of no interest here, only that all are there: rates, and seconds of each size."""
    found = measure(2, 1)
    machine = found.machine
    assert min(machine.polar, machine.factors, machine.memory, machine.intra, found.thin) > 0
    assert [size for size, _ in found.links] == [2.0 * entries for entries in MESSAGES]
    assert all(0 <= seconds < 10 for _, seconds in found.links)
    assert found.links[-1][1] > 0, "8 MB take time, whatever is around them"
    assert "between products" in found.words[0]
