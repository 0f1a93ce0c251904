"""Accelerate with FSDP2: the optimizer is made over whole parameters, which are exchanged for shards afterwards."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from orthoshard import Dion
from processes import run_processes

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'orthoshard[hosts]'")

STEPS, SAVED = 24, 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 10)
        self.mid = nn.Linear(10, 10, bias=False)
        self.head = nn.Linear(10, 3)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def batch(step, rank, ranks):
    """This rank's part of 16 rows: all ranks together see what one process sees."""
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return x.chunk(ranks)[rank], x.sum(1).sign().long().add(1).chunk(ranks)[rank]


def train(model, optimizer, backward, clip, steps, rank=0, ranks=1):
    losses = []
    for step in steps:
        x, y = batch(step, rank, ranks)
        loss = nn.functional.cross_entropy(model(x), y)
        backward(loss)
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def on_a_rank(rank, folder, saves):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate_on_cpu import believe_in_fsdp_on_cpu
    from torch.distributed.tensor import DTensor

    believe_in_fsdp_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="no_wrap",
        state_dict_type="sharded_state_dict",
        cpu_ram_efficient_loading=saves,  # the weights of rank 0 go to all
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    net = Net()
    if saves and rank:
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
    made = Dion(net, lr=0.02, rank_fraction=0.5)
    model, optimizer = accelerator.prepare(net, made)
    held = [p for group in made.param_groups for p in group["params"]]
    seen = {"sharded": all(isinstance(p, DTensor) for p in held), "state": len(made.state)}
    if not saves:
        accelerator.load_state(folder)
    first = 0 if saves else SAVED
    for begin, end in ((0, SAVED), (SAVED, STEPS)):
        if begin >= first:
            train(model, optimizer, accelerator.backward, accelerator.clip_grad_norm_, range(begin, end), rank, 2)
            if end == SAVED:
                accelerator.save_state(folder)
    seen["strangers"] = len(set(made.state) - set(held))
    seen["weights"] = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    return seen


def test_parameters_exchanged_after_construction(tmp_path):
    whole, again = run_processes(2, [(on_a_rank, (str(tmp_path), saves)) for saves in (True, False)])
    for seen in (*whole, *again):
        assert not isinstance(seen, str), seen
        assert seen["sharded"]
        assert seen["state"] == 0, "state of whole parameters was made, only to be left behind"
        assert seen["strangers"] == 0
        for name, weight in whole[0]["weights"].items():
            assert seen["weights"][name] == weight, "resumed, or another rank: not the same run"
    alone = Net()
    losses = train(
        alone,
        Dion(alone, lr=0.02, rank_fraction=0.5),
        lambda loss: loss.backward(),
        nn.utils.clip_grad_norm_,
        range(STEPS),
    )
    assert losses[-1] < 0.7 * losses[0]
    for name, weight in alone.named_parameters():
        assert torch.allclose(weight.new_tensor(whole[0]["weights"][name]), weight, rtol=0, atol=1e-9), (
            "FSDP2 is another run than one process"
        )
