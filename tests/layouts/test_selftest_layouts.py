"""The layouts of ``bench --self-test``: what two ranks find, and what becomes of it where one of them fails."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from orthoshard.engine.step import Step
from orthoshard.lab.bench.selftest import layouts
from orthoshard.lab.bench.selftest.layouts import RULES, Ranks, possible
from simulate import simulate

CPU = torch.device("cpu")


def found(rank, name, rule):
    layout = possible(2)[name]
    return layouts._error({**RULES[rule], **layout.options}, layout, Ranks(CPU, "threaded", None, rank, 2))


@pytest.mark.parametrize(("name", "rule"), [("fsdp 2", "dion"), ("tp 2", "muon"), ("ddp 2, zero1", "dion_tail")])
def test_pieces_are_those_of_the_one_process_run(name, rule, monkeypatch):
    assert all(figure <= limit for figure, limit in simulate(2, found, name, rule))
    take = Step.take

    def drifts(self, *args):
        take(self, *args)
        self.weights[0].mul_(1 + 1e-11 * (self.comm.bytes > 0))

    monkeypatch.setattr(Step, "take", drifts)
    assert any(figure > limit for figure, limit in simulate(2, found, name, rule))


def test_how_many_processes_allow_which_layouts():
    assert [name for name in possible(3) if "x" in name] == []
    assert "fsdp 2 x tp 2" in possible(4)
    assert "replicas 2 x fsdp 2 x tp 2" in possible(8)
    assert all(len(layout.mesh) == 1 for layout in possible(2).values())


def told(monkeypatch, *calls):
    """What `Ranks.together` returns or raises at each rank that makes one of ``calls``."""
    monkeypatch.setattr(layouts, "A_STEP_AT_MOST", layouts.timedelta(seconds=5))
    store, answers = dist.HashStore(), {}
    ranks = [Ranks(CPU, "gloo", store, rank, len(calls)) for rank in range(len(calls))]

    def body(rank):
        try:
            answers[rank] = ranks[rank].together(calls[rank])
        except AssertionError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers, [each.in_step for each in ranks]


def test_rank_0_says_the_worst_of_all(monkeypatch):
    answers, in_step = told(monkeypatch, lambda: (1.0, 10.0), lambda: (0.1, 0.2))
    assert answers[0] == (0.1, 0.2)
    assert in_step == [True, True]


def test_what_one_rank_raises_rank_0_says_and_all_stop(monkeypatch):
    answers, in_step = told(monkeypatch, lambda: (1.0, 10.0), lambda: 1 / 0)
    assert answers[0] == "rank 1: ZeroDivisionError: division by zero"
    assert in_step == [False, False]


def test_one_process_has_no_layouts(monkeypatch):
    for name in layouts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (only,) = layouts.layouts(CPU)
    assert only.what == "all"
