"""What the frameworks that host an optimizer demand of it, by number; docs/frameworks.md is for their users.

Demand 4 (meshes come from the parameters) is tests/layouts/test_processes.py; demand 21 (no host sync, CUDA graphs)
is tests/test_capturable.py.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from orthoshard import Dion, Muon, RuleOptimizer, param_groups

OPTIMIZERS = {
    "dion": lambda params, **k: Dion(params, rank_fraction=0.5, **k),
    "dion-lion": lambda params, **k: (
        Dion(params, scalar="lion", **k) if isinstance(params, nn.Module) else Dion(params)
    ),
    "muon": lambda params, **k: Muon(params, **k),
    "adamw": lambda params, **k: RuleOptimizer(params, rule="adamw", **k),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8, dtype=dtype)
        self.up = nn.Linear(8, 12, dtype=dtype)
        self.mid = nn.Linear(12, 12, dtype=dtype)
        self.down = nn.Linear(12, 8, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.head = nn.Linear(8, 11, bias=False, dtype=dtype)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(torch.relu(self.mid(self.up(x))))))


def loss_of(model, step):
    tokens = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).float(), (tokens + 1) % 11)


def train(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


@every
def test_01_step_takes_a_closure_by_position_or_keyword(make):
    model = Net()
    optimizer = make(model)
    grad_was_on = []

    def closure():
        grad_was_on.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    before = weights(model)
    first, second = optimizer.step(closure), optimizer.step(closure=closure)
    assert second < first
    assert grad_was_on == [True, True]
    assert not torch.equal(before, weights(model))
    assert optimizer.step() is None
    assert optimizer.step(closure=None) is None


@every
def test_02_methods_keep_torchs_parameter_names(make):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(state_dict=saved)
    frozen = nn.Parameter(torch.zeros(3, 3))
    optimizer.add_param_group(param_group={"params": [("extra", frozen)]})
    assert optimizer.param_groups[-1]["params"][0] is frozen


@every
def test_03_parameters_may_be_replaced_after_construction(make):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, 0, 1)
    reference = Net()
    other = make(reference)
    train(reference, other, 0, 1)
    replaced = nn.Parameter(model.mid.weight.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [replaced if p is model.mid.weight else p for p in group["params"]]
    optimizer.state[replaced] = optimizer.state.pop(model.mid.weight)
    model.mid.weight = replaced
    train(model, optimizer, 1, 3)
    train(reference, other, 1, 3)
    assert torch.equal(weights(model), weights(reference))


@every
def test_05_a_zero_gradient_zero_lr_step_on_empty_state_leaves_no_trace(make):
    model, untouched = Net(), Net()
    optimizer, plain = make(model), make(untouched)
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert torch.equal(weights(model), weights(untouched))
    assert all(float(s["step"]) == 0 for s in optimizer.state.values() if "step" in s)
    assert len(optimizer.state) == len(list(model.parameters()))
    train(model, optimizer, 0, 3)
    train(untouched, plain, 0, 3)
    assert torch.equal(weights(model), weights(untouched))


@every
def test_06_every_group_has_lr_float_or_tensor_and_schedulers_turn_it(make):
    model, reference = Net(), Net()
    optimizer, other = make(model), make(reference)
    for group in optimizer.param_groups:
        assert isinstance(group["lr"], float)
        group["lr"] = torch.tensor(group["lr"])
    a = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    b = LambdaLR(other, lambda step: 1 / (1 + step))
    assert all("initial_lr" in group for group in other.param_groups)
    for step in range(4):
        train(model, optimizer, step, step + 1)
        train(reference, other, step, step + 1)
        a.step()
        b.step()
    assert torch.allclose(weights(model), weights(reference), rtol=0, atol=1e-5)


@every
def test_07_onecycle_finds_momentum_or_betas(make):
    model = Net()
    optimizer = make(model)
    scheduler = OneCycleLR(optimizer, max_lr=0.02, total_steps=6, base_momentum=0.85, max_momentum=0.9)
    cycled = set()
    for step in range(5):
        train(model, optimizer, step, step + 1)
        scheduler.step()
        group = next(group for group in optimizer.param_groups if group["role"] == "matrix")
        cycled.add(group["betas"][0] if group["rule"] == "adamw" else group["momentum"])
    assert len(cycled) > 2, "the value that this rule reads must move"
    assert all(0.85 <= value <= 0.9 for value in cycled)
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    rate = optimizer.param_groups[0]["lr"]
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == rate * 0.5


@every
def test_08_state_values_are_tensors(make):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, 0, 1)
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert values
    assert all(isinstance(value, torch.Tensor) for value in values)


@every
def test_09_groups_are_plain_alike_and_survive_weights_only(make):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    assert len({frozenset(group) for group in optimizer.param_groups}) == 1
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    resumed = make(fresh)
    resumed.load_state_dict(loaded)
    train(model, optimizer, 2, 5)
    train(fresh, resumed, 2, 5)
    assert torch.equal(weights(model), weights(fresh))


@every
def test_10_no_group_is_ever_empty(make):
    only_matrix = nn.Linear(4, 4, bias=False)
    assert all(group["params"] for group in make(only_matrix).param_groups)
    assert all(group["params"] for group in make(Net()).param_groups)
    with pytest.raises(ValueError, match="empty"):
        make([{"params": []}])


def test_11_names_and_injected_keys_are_accepted():
    model = Net()
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    optimizer = Dion(named)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in named]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named]
    for group in param_groups(model):
        RuleOptimizer([{**group, "fused": True, "foreach": False, "capturable": False}])
    Dion(Net(), fused=None, foreach=True)


@every
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_12_state_keeps_its_dtype_through_loading(make, parameters):
    model = Net(parameters)
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, old in zip(model.parameters(), before, strict=True):
        for key, value in optimizer.state[parameter].items():
            assert value.dtype == old[key].dtype
            assert torch.equal(value, old[key]), "a detour through the parameter's dtype has cut bits off"


def test_12_bfloat16_state_of_float32_parameters_survives():
    model = Net()
    optimizer = Dion(model, state_dtype="bfloat16")
    train(model, optimizer, 0, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[model.up.weight]["momentum"].dtype == torch.bfloat16


@every
@pytest.mark.parametrize("flat", [False, True])
def test_13_distributed_checkpoints_state_dict_round_trip(make, flat):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, 0, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    resumed = make(fresh)
    set_optimizer_state_dict(fresh, resumed, saved, options=options)
    train(model, optimizer, 3, 6)
    train(fresh, resumed, 3, 6)
    assert torch.equal(weights(model), weights(fresh))


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_14_deepcopy_and_pickle(make, clone):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    other, its = clone((model, optimizer))
    assert all(p is not q for p, q in zip(model.parameters(), other.parameters(), strict=True))
    train(model, optimizer, 2, 4)
    assert not torch.equal(weights(model), weights(other)), "the copy must not move with the original"
    train(other, its, 2, 4)
    assert torch.equal(weights(model), weights(other))


@every
def test_15_no_global_random_numbers_and_bit_exact_resume(make):
    model = Net()
    optimizer = make(model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert torch.equal(before, torch.get_rng_state())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(99)
    fresh = Net()
    fresh.load_state_dict(saved[0])
    resumed = make(fresh)
    resumed.load_state_dict(saved[1])
    train(model, optimizer, 3, 6)
    train(fresh, resumed, 3, 6)
    assert torch.equal(weights(model), weights(fresh))


@every
def test_16_groups_added_before_and_after_steps(make):
    torch.manual_seed(1)
    first, second, third = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))
    optimizer = make([first])
    optimizer.add_param_group({"params": [second]})
    for parameter in (first, second):
        parameter.grad = torch.randn(6, 6)
    optimizer.step()
    momentum = {k: v.clone() for k, v in optimizer.state[first].items()}
    optimizer.add_param_group({"params": [third], "lr": 0.5})
    optimizer.initialize_state()
    assert all(torch.equal(v, optimizer.state[first][k]) for k, v in momentum.items())
    before = third.detach().clone()
    third.grad = torch.randn(6, 6)
    optimizer.step()
    assert not torch.equal(before, third)
    assert optimizer.param_groups[-1]["lr"] == 0.5
    optimizer.param_groups.pop()
    optimizer.step()
    with pytest.raises(RuntimeError, match="put its group back"):
        optimizer.state_dict()
    del optimizer.state[third]
    assert len(optimizer.state_dict()["state"]) == 2


@every
@pytest.mark.parametrize("set_to_none", [True, False])
def test_17_missing_gradients_frozen_parameters_and_storage(make, set_to_none):
    model = Net()
    optimizer = make(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, 0, 2)
    optimizer.zero_grad(set_to_none=set_to_none)
    loss_of(model, 2).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for absent in (model.mid.weight, model.norm.bias):
        absent.grad = None
    model.up.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {k: v.clone() for k, v in optimizer.state[model.mid.weight].items()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        still = name in ("mid.weight", "norm.bias", "up.weight")
        assert torch.equal(parameter, before[name]) == still, name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name])
    assert all(torch.equal(v, optimizer.state[model.mid.weight][k]) for k, v in kept.items())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()


@every
def test_18_a_step_that_gradscaler_skips_changes_nothing(make):
    model = Net()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(3):
        before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.mid.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weights(model)) == (step == 1)
        if step == 1:
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])


@every
def test_19_step_and_state_dict_hooks_run(make):
    model = Net()
    optimizer = make(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append("loading"))
    train(model, optimizer, 0, 1)
    saved = optimizer.state_dict()
    assert saved["mark"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after", "loading"]


@every
def test_20_the_eager_step_never_compiles(make):
    torch._dynamo.reset()
    model = Net()
    train(model, make(model), 0, 2)
    assert not torch._dynamo.utils.counters["stats"]


def test_22_experts_tied_weights_convolutions_and_empty_tensors():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.experts = nn.Parameter(torch.randn(3, 8, 6))
            self.conv = nn.Conv2d(1, 2, 3)
            self.nothing = nn.Parameter(torch.zeros(0, 4))
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.table.weight

    model = Odd()
    optimizer = Dion(model)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    roles = {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    assert roles["table.weight"] == "embedding"
    assert roles["experts"] == "experts"
    assert roles["conv.weight"] == "embedding"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0 or not torch.equal(before[name], parameter)


def test_23_a_factory_with_model_and_options():
    """`optimizer_cls_and_kwargs=(Factory, kwargs)` ends in `Factory()(model, **kwargs)`."""

    class Factory:
        def __call__(self, model, **kwargs):
            return Dion(model, **kwargs)

    optimizer = Factory()(Net(), lr=0.01, rank_fraction=0.5)
    (matrices,) = [group for group in optimizer.param_groups if group["role"] == "matrix"]
    assert (matrices["lr"], matrices["rank_fraction"]) == (0.01, 0.5)


@every
def test_it_learns(make):
    model = Net()
    optimizer = make(model, lr=0.02)
    first = loss_of(model, 0).item()
    train(model, optimizer, 0, 100)
    assert loss_of(model, 0).item() < 0.7 * first
