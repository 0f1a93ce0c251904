"""Scripts for torch.optim.Muon, with the import changed alone; trajectories beside its arithmetic and beside itself."""

from __future__ import annotations

import arithmetic
import pytest
import torch
from torch import nn

from orthoshard.compat import torch_muon

# As in its docstring.
SCRIPT = """
import torch
from torch.optim import Muon

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
muon_params = [p for p in model.parameters() if p.ndim == 2]
other_params = [p for p in model.parameters() if p.ndim != 2]
optim_muon = Muon(muon_params, lr=0.02, momentum=0.95)
optim_adamw = torch.optim.AdamW(other_params, lr=3e-4, weight_decay=0.01)
losses = []
for step in range(20):
    input = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
    optim_muon.zero_grad()
    optim_adamw.zero_grad()
    loss = (model(input) - input[:, :4].sin()).square().mean()
    loss.backward()
    optim_muon.step()
    optim_adamw.step()
    losses.append(loss.item())
"""


def run(text):
    space = {}
    exec(compile(text, "script", "exec"), space)
    return space


def test_its_example_with_the_import_changed_alone():
    theirs, ours = run(SCRIPT), run(SCRIPT.replace("from torch.optim", "from orthoshard.compat.torch_muon"))
    assert isinstance(ours["optim_muon"], torch_muon.Muon)
    for a, b in zip(theirs["losses"], ours["losses"], strict=True):
        assert abs(a - b) < 2e-2 * theirs["losses"][0]  # torch iterates in bfloat16


def gradients(shape, steps=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


OPTIONS = {
    "as it comes": ({}, {}),
    "rms": ({"adjust_lr_fn": "match_rms_adamw"}, {"adjust": "match_rms_adamw"}),
    "no Nesterov": ({"nesterov": False, "momentum": 0.9}, {"nesterov": False, "mu": 0.9}),
    "seven steps": ({"ns_steps": 7}, {"polar": arithmetic.jordan(7)}),
    "coefficients": ({"ns_coefficients": (2.0, -1.5, 0.5)}, {"polar": arithmetic.jordan(5, (2.0, -1.5, 0.5))}),
}


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("name", OPTIONS)
def test_trajectories_are_its_arithmetic(name, shape):
    options, own = OPTIONS[name]
    W = gradients(shape, 1)[0]
    p = nn.Parameter(W.clone())
    optimizer = torch_muon.Muon([p], lr=0.03, weight_decay=0.2, **options)
    oracle = arithmetic.TorchMuon(W, lr=0.03, wd=0.2, **{"adjust": "original", "polar": arithmetic.jordan(5), **own})
    for G in gradients(shape):
        p.grad = G
        optimizer.step()
        oracle.step(G)
    assert (p - oracle.W).norm() < 1e-6 * (oracle.W - W).norm()


def test_its_checkpoint_goes_on_as_it_would_have():
    p, q = (nn.Parameter(gradients((6, 4), 1)[0].float()) for _ in range(2))
    theirs = torch.optim.Muon([p], lr=0.05, weight_decay=0.0, momentum=0.8)
    steps = [G.float() for G in gradients((6, 4))]
    for G in steps[:3]:
        p.grad = G
        theirs.step()
    ours = torch_muon.Muon([q])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.05
    with torch.no_grad():
        q.copy_(p)
    before = p.detach().clone()
    for G in steps[3:]:
        p.grad = q.grad = G
        theirs.step()
        ours.step()
    assert (p - q).norm() < 0.03 * (p - before).norm()


def test_named_state_of_torchs_goes_to_the_parameter_of_its_name():
    a, b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    theirs = torch.optim.Muon([("a", a), ("b", b)])
    for p in (a, b):
        p.grad = torch.randn(4, 4)
    theirs.step()
    ours = torch_muon.Muon([("b", b), ("a", a)])
    ours.load_state_dict(theirs.state_dict())
    for p in (a, b):
        assert torch.allclose(ours.state[p]["momentum"], 20 * theirs.state[p]["momentum_buffer"])


def test_what_it_refuses_is_refused():
    for wrong in ({"adjust_lr_fn": "rms"}, {"ns_steps": 0}, {"momentum": -1.0}, {"lr": -1.0}, {"nonesuch": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            torch_muon.Muon([nn.Parameter(torch.ones(2, 2))], **wrong)
    with pytest.raises(ValueError, match="takes matrices"):
        torch_muon.Muon([nn.Parameter(torch.ones(2))])


def test_groups_of_other_sizes_and_batches_of_matrices_are_refused():
    def parameters():
        return [nn.Parameter(torch.randn(8, 8)) for _ in range(4)]

    one, *others = parameters()
    saved = torch.optim.Muon([{"params": others, "lr": 0.1}, {"params": [one], "lr": 0.5}]).state_dict()
    one, *others = parameters()
    with pytest.raises(ValueError, match="the saved groups have 3, 1 parameters"):
        torch_muon.Muon([{"params": [one]}, {"params": others}]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"the shape \(4, 4, 4\)"):
        torch_muon.Muon([nn.Parameter(torch.randn(4, 4, 4))])
