"""Every architecture of the zoo trains: 20 steps of Dion on one batch, on the groups that are made for it."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO, batch, build

from orthoshard import Dion, Muon

STEPS = 20


def losses(model, optimizer, inputs):
    found = []
    for _ in range(STEPS):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("name", ZOO)
def test_loss_falls_over_twenty_steps_on_one_batch(name):
    torch.set_num_threads(1)
    model = build(name, "cpu").train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Dion(model, lr=0.02, rank_fraction=0.5)
    found = losses(model, optimizer, batch(name))
    assert found[-1] < 0.8 * found[0]
    assert optimizer.skipped_steps == 0
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert moved >= expected


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_muon_too(name):
    model = build(name, "cpu").train()
    found = losses(model, Muon(model, lr=0.02), batch(name))
    assert found[-1] < 0.8 * found[0]
