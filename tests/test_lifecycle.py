"""An optimizer over its life: options handed down, wrappers, freezing, copies, loading what does not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from orthoshard import Dion, Muon, RuleOptimizer, param_groups


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))


def step(net, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
    optimizer.step()


def group_of(optimizer, role):
    return next(group for group in optimizer.param_groups if group["role"] == role)


def test_groups_without_a_rule_take_the_optimizers():
    group = group_of(Muon(param_groups(model()), lr=0.1, momentum=0.5), "matrix")
    assert (group["rule"], group["lr"], group["momentum"]) == ("muon", 0.1, 0.5)


def test_options_reach_every_group_whose_rule_reads_them():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Dion([{"params": [p], "rule": "muon"}, {"params": [q]}], momentum=0.5, weight_decay=0.3, lr=0.07)
    muon, dion = optimizer.param_groups
    assert (muon["momentum"], muon["weight_decay"], muon["lr"]) == (0.5, 0.3, 0.02)
    assert (dion["momentum"], dion["weight_decay"], dion["lr"]) == (0.5, 0.3, 0.07)
    assert group_of(Dion(model(), fused=False), "bias")["fused"] is False


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        Dion(model(), differentiable=True)


def test_a_tensor_lr_stays_the_users_tensor():
    lr = torch.tensor(0.5)
    optimizer = Dion([nn.Parameter(torch.ones(4, 4))], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("rule", ["dion", "muon", "adamw", "lion"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_tensor_lr_is_a_number_to_every_kernel(rule, strided):
    weights = []
    for lr in (0.1, torch.tensor(0.1)):
        p = nn.Parameter(torch.arange(12.0).view(4, 3).T if strided else torch.arange(12.0).view(3, 4))
        optimizer = RuleOptimizer([p], rule=rule, lr=lr)
        p.grad = torch.ones(3, 4)
        optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)


def test_a_compiled_model_has_the_same_names_and_bases():
    plain = Dion(model())
    compiled = Dion(torch.compile(model()))
    names = [[name for group in o.param_groups for name in group["param_names"]] for o in (plain, compiled)]
    assert names[0] == names[1]
    plain.initialize_state()
    compiled.initialize_state()
    p, q = (next(p for p in group_of(o, "matrix")["params"]) for o in (plain, compiled))
    assert torch.equal(plain.state[p]["Q"], compiled.state[q]["Q"])


def test_state_of_frozen_parameters_survives_loading_and_thawing():
    net = model()
    optimizer = Dion(net)
    step(net, optimizer)
    frozen = net[1].weight
    kept = {key: value.clone() for key, value in optimizer.state[frozen].items()}
    frozen.requires_grad_(False)
    step(net, optimizer, 1)
    assert all(torch.equal(value, optimizer.state[frozen][key]) for key, value in kept.items())
    momentum = optimizer.state[frozen]["momentum"]
    assert momentum.untyped_storage().nbytes() == momentum.numel() * 4, "it keeps a whole bucket alive"
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(value, optimizer.state[frozen][key]) for key, value in kept.items())
    frozen.requires_grad_(True)
    step(net, optimizer, 2)
    assert not torch.equal(optimizer.state[frozen]["momentum"], kept["momentum"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_counters_and_take_new_groups(clone):
    net = model()
    optimizer = Dion(net, weight_decay=0.3)
    net[0].weight.grad = torch.full((8, 6), torch.nan)
    optimizer.step()
    other = clone(optimizer)
    assert (other.skipped_steps, other.skipped_in_a_row) == (1, 1)
    other.add_param_group({"params": [("new", nn.Parameter(torch.ones(4, 4)))]})
    assert other.param_groups[-1]["weight_decay"] == 0.3
    assert len(optimizer.param_groups) == len(other.param_groups) - 1


def test_another_rules_state_is_refused():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match="saved under rule 'muon', and is 'dion' here"):
        Dion([p]).load_state_dict(Muon([q]).state_dict())


def test_state_that_is_not_complete_is_refused():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Dion([p])
    optimizer.initialize_state()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["momentum"]
    with pytest.raises(ValueError, match=r"no 'momentum': it is not complete"):
        optimizer.load_state_dict(saved)


def test_names():
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match="two parameters are named 'a'"):
        Dion([("a", p), ("a", q)])
    with pytest.raises(ValueError, match="two parameters are named 'a'"):
        Dion([{"params": [("a", p)]}, {"params": [("a", q)]}])
    with pytest.raises(ValueError, match="2 parameters and 1 names"):
        Dion([{"params": [p, q], "param_names": ["a"]}])


def test_roles_that_are_easily_mistaken():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(8, 50, bias=False)
            self.table = nn.Embedding(50, 8)
            self.positions = nn.Embedding(32, 8)
            self.pos_embed = nn.Parameter(torch.zeros(32, 8))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.bags = nn.EmbeddingBag(5, 8)
            self.gate = nn.Linear(8, 1, bias=False)
            self.lstm = nn.LSTM(8, 8)
            self.out = nn.Linear(8, 32, bias=False)

    roles = {name: group["role"] for group in param_groups(Net()) for name in group["param_names"]}
    assert roles["lm_head.weight"] == "head"
    assert roles["cls_token"] == roles["bags.weight"] == "embedding"
    assert roles["pos_embed"] == roles["positions.weight"] == "position"
    assert roles["gate.weight"] == "router"
    assert roles["lstm.bias_ih_l0"] == "bias"
    assert roles["out.weight"] == roles["lstm.weight_ih_l0"] == "matrix"


def test_many_groups_are_added_in_linear_time():
    """Plans of the new group alone: 400 groups make 400 plans of one parameter, not 80,000."""
    planned = []
    import orthoshard.optimizer as home

    build = home.build_plan
    home.build_plan = lambda groups, *rest: planned.append(len(groups)) or build(groups, *rest)
    try:
        Dion([{"params": [nn.Parameter(torch.ones(2, 2))]} for _ in range(400)])
    finally:
        home.build_plan = build
    assert sum(planned) == 400
