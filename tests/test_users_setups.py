"""Setups in which users' optimizers failed in public, as they would write them; docs/log.md has links to them."""

from __future__ import annotations

import copy
import io
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from orthoshard import Dion, DionTail, Muon, RuleOptimizer, param_groups

RULES = {"dion": Dion, "dion_tail": DionTail, "muon": Muon, "adamw": lambda m, **k: RuleOptimizer(m, rule="adamw", **k)}
every = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def batch(step):
    return torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))


def backward(model, step, **options):
    loss = cross_entropy(model(batch(step)), (batch(step) + 1) % 11)
    loss.backward(**options)
    return loss


def train(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def weights(model):
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def trained(make, steps):
    model = Net()
    train(model, make(model), 0, steps)
    return weights(model)


@every
def test_a_backward_pass_through_weights_that_have_moved_is_autograds_error(make):
    model = Net()
    optimizer = make(model)
    loss = backward(model, 0, retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rule", ["dion", "dion_tail", "muon", "lion"])
def test_whole_numbers_where_fractions_are_usual(rule):
    results = []
    for number in (int, float):
        model = nn.Linear(6, 4, bias=False)
        nn.init.ones_(model.weight)
        key = {"betas": (number(0), 0.9)} if rule == "lion" else {"momentum": number(0)}
        optimizer = RuleOptimizer(model, rule=rule, lr=number(1), weight_decay=number(0), **key)
        for step in range(2):
            model.weight.grad = torch.arange(24.0).view(4, 6).sin() + step
            optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(*results)


def test_numbers_of_numpy_train_and_are_saved_as_plain_ones():
    rates = np.linspace(0.02, 0.01, 4), np.linspace(0.02, 0.01, 4, dtype=np.float32)
    for schedule in rates:
        model, again = Net(), Net()
        optimizer, other = Dion(model, lr=schedule[0]), Dion(again, lr=float(schedule[0]))
        for step, rate in enumerate(schedule):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for group in other.param_groups:
                group["lr"] = float(rate)
            train(model, optimizer, step, step + 1)
            train(again, other, step, step + 1)
        assert torch.equal(weights(model), weights(again))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))


@every
def test_an_optimizer_that_a_host_builds_anew_from_groups_and_defaults(make):
    model = Net()
    given = make(model, lr=0.01)
    train(model, type(given)(given.param_groups, **given.defaults), 0, 2)
    assert torch.equal(weights(model), trained(lambda net: make(net, lr=0.01), 2))
    for cycled in (lambda: OneCycleLR(given, 0.1, total_steps=4), lambda: CyclicLR(given, 0.01, 0.1)):
        cycled()  # writes a momentum into every group
        type(given)(given.param_groups, **given.defaults)


def test_a_look_at_the_state_of_parameters_makes_none():
    model = Net()
    optimizer = Dion(model)
    for parameter in model.parameters():
        assert not optimizer.state[parameter]  # a defaultdict: now there is an empty entry
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert not any(optimizer.state_dict()["state"].values())
    optimizer.step()  # as torch.distributed.checkpoint makes state
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    train(model, optimizer, 0, 3)
    assert torch.equal(weights(model), trained(Dion, 3))
    assert {float(held["step"]) for held in optimizer.state.values() if "step" in held} == {3.0}


@pytest.mark.parametrize("capturable", [False, True])
def test_weights_that_were_replaced_after_the_optimizer_was_built_give_a_warning(capturable):
    model = Net()
    optimizer = Dion(model, capturable=capturable)
    model.load_state_dict(Net().state_dict(), assign=True)
    backward(model, 0)
    with pytest.warns(UserWarning, match="build the optimizer after that") as warned:
        optimizer.step()
    assert warned[0].filename == __file__


@every
def test_a_module_that_swaps_its_tensors(make):
    models = [Net(), Net()]
    for swaps, model in enumerate(models):
        optimizer = make(model)
        train(model, optimizer, 0, 2)
        optimizer.zero_grad()
        torch.__future__.set_swap_module_params_on_conversion(bool(swaps))
        try:
            model.double()
            model.load_state_dict(model.state_dict())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        train(model, optimizer, 2, 4)
    assert torch.equal(*map(weights, models))


@pytest.mark.parametrize("make", [Dion, Muon])
def test_an_optimizer_for_each_parameter_that_steps_in_the_backward_pass(make):
    model = Net()
    for group in param_groups(model):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer = make([{**group, "params": [parameter], "param_names": [name]}])

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
    for step in range(3):
        backward(model, step)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(weights(model), trained(make, 3), rtol=0, atol=1e-6)


def test_a_part_that_is_frozen_by_turns_as_in_adversarial_training():
    model = Net()
    optimizer = Dion(model)
    for step in range(4):
        model.requires_grad_(False)
        optimizer.state_dict()
        model.requires_grad_(True)
        train(model, optimizer, step, step + 1)
    assert torch.equal(weights(model), trained(Dion, 4))


@pytest.mark.parametrize("make", [Dion, Muon])
def test_kernels_that_change_to_channels_last_in_between(make):
    results = []
    for change in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        optimizer = make(model)
        for step in range(4):
            if change and step == 2:
                model.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["clear", "replace", "setstate"])
def test_state_that_is_thrown_away_is_made_anew(how):
    model, again = Net(), Net()
    optimizer = Dion(model)
    train(model, optimizer, 0, 2)
    again.load_state_dict(model.state_dict())
    if how == "clear":
        optimizer.state.clear()
    elif how == "replace":
        optimizer.state = defaultdict(dict)
    else:
        optimizer.__setstate__({"state": defaultdict(dict)})
    train(model, optimizer, 2, 4)
    train(again, Dion(again), 2, 4)
    assert torch.equal(weights(model), weights(again))


@every
def test_what_a_wrapper_keeps_in_the_state_stays_there(make):
    model, again = Net(), Net()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    for parameter in model.parameters():
        optimizer.state[parameter]["slow"] = parameter.detach().clone()  # Lookahead
    slow = weights(model)
    model.norm.requires_grad_(False)  # a new plan
    train(model, optimizer, 2, 4)
    restored = make(again)
    again.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (model, again):
        one.norm.requires_grad_(True)
    train(model, optimizer, 4, 6)
    train(again, restored, 4, 6)
    assert torch.equal(weights(model), weights(again))
    for holder, net in ((optimizer, model), (restored, again)):
        assert torch.equal(torch.cat([holder.state[p]["slow"].flatten().double() for p in net.parameters()]), slow)


@pytest.mark.parametrize("scalar", ["adamw", "lion"])
def test_float16_weights_take_the_steps_of_float32_ones(scalar):
    narrow, wide = Net().half(), Net()
    for parameter in narrow.parameters():
        parameter.detach().mul_(0.1)  # of which a step is more than one rounding
    wide.load_state_dict(narrow.state_dict())
    optimizers = Dion(narrow, scalar=scalar), Dion(wide, scalar=scalar)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            p.grad = (1e-6 * torch.randn(p.shape, generator=generator)).half()  # whose squares are zero in float16
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(weights(narrow), weights(wide), rtol=0, atol=2e-3)


def test_parameters_that_grow_and_shrink_with_their_state():
    """As Gaussian splatting does it: groups are found by name, and moments are cut and extended with the parameter."""
    results = []
    for make in (torch.optim.AdamW, lambda groups, **options: RuleOptimizer(groups, rule="adamw", **options)):
        torch.manual_seed(0)
        clouds = {name: nn.Parameter(torch.randn(10, *rest)) for name, rest in (("xyz", (3,)), ("color", (1, 3)))}
        groups = [{"params": [cloud], "name": name} for name, cloud in clouds.items()]
        optimizer = make(groups, lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)

        def exchange(change, clouds=clouds, optimizer=optimizer):
            for group in optimizer.param_groups:
                state = optimizer.state.pop(group["params"][0])
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = change(state[moment], torch.zeros(2))
                fresh = nn.Parameter(change(group["params"][0].detach(), torch.ones(2)))
                group["params"][0] = clouds[group["name"]] = fresh
                optimizer.state[fresh] = state

        def grow(x, new):
            return torch.cat([x, new.view(2, *[1] * (x.ndim - 1)).expand(2, *x.shape[1:])])

        for change in (grow, lambda x, _: x[::2], None):
            for step in range(3):
                optimizer.zero_grad()
                sum((cloud * (step + 1)).sin().sum() for cloud in clouds.values()).backward()
                optimizer.step()
            if change:
                exchange(change)
        results.append(torch.cat([cloud.detach().flatten() for cloud in clouds.values()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
