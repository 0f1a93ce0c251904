"""torchtitan's own containers around an orthoshard optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torchtitan", reason="torchtitan is not installed: see docs/frameworks.md")

from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
from torchtitan.components.optimizer.utils import init_optim_state

from orthoshard.hosts.torchtitan import OrthoshardOptimizers


class Part(nn.Module):
    def __init__(self, number):
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.ModuleDict({str(number): nn.Linear(6, 6)})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def parts():
    return [Part(0), Part(1)]


def train(models, optimizers, steps):
    for step in steps:
        optimizers.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        models[1](models[0](x)).square().mean().backward()
        optimizers.step()


def weights(models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


CONFIG = OrthoshardOptimizers.Config(
    rule="muon", lr=0.01, scalar="lion", scalar_lr=0.001, seed=3, options={"weight_decay": 0.3}
)


def test_the_configuration_reaches_one_optimizer_for_each_part():
    models = parts()
    optimizers = CONFIG.build(model_parts=models)
    assert len(optimizers) == 2
    for number, optimizer in enumerate(optimizers):
        matrix, bias = optimizer.param_groups
        assert (matrix["rule"], matrix["lr"], matrix["weight_decay"], matrix["seed"]) == ("muon", 0.01, 0.3, 3)
        assert (bias["rule"], bias["lr"]) == ("lion", 0.001)
        assert matrix["param_names"] == [f"layers.{number}.weight"]


def test_its_flat_state_dict_carries_both_parts_over():
    models = parts()
    optimizers = OrthoshardOptimizers.Config().build(model_parts=models)
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=10)
    train(models, optimizers, range(4))
    schedulers.step()
    saved = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in optimizers.state_dict().items()
    }
    assert "state.layers.0.weight.Q" in saved
    assert "state.layers.1.weight.momentum" in saved
    fresh = parts()
    for ours, theirs in zip(fresh, models, strict=True):
        ours.load_state_dict(theirs.state_dict())
    resumed = OrthoshardOptimizers.Config().build(model_parts=fresh)
    resumed.load_state_dict(saved)
    assert [group["param_names"] for o in resumed for group in o.param_groups] == [
        group["param_names"] for o in optimizers for group in o.param_groups
    ]
    train(models, optimizers, range(4, 8))
    train(fresh, resumed, range(4, 8))
    assert torch.equal(weights(models), weights(fresh))


def test_making_state_leaves_no_trace():
    models, others = parts(), parts()
    optimizers, untouched = (OrthoshardOptimizers.Config().build(model_parts=m) for m in (models, others))
    for optimizer in optimizers:
        init_optim_state(optimizer)
        assert optimizer.state
    train(models, optimizers, range(3))
    train(others, untouched, range(3))
    assert torch.equal(weights(models), weights(others))


def test_hooks_of_the_container_run_before_its_steps():
    models, seen = parts(), []
    optimizers = OrthoshardOptimizers.Config().build(model_parts=models)
    optimizers.register_step_pre_hook(lambda *_: seen.append("before"))
    train(models, optimizers, range(2))
    assert seen == ["before"] * 2


@pytest.mark.parametrize(
    "given",
    [
        {"implementation": "foreach"},
        {"param_groups": [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1})]},
    ],
    ids=lambda given: next(iter(given)),
)
def test_settings_that_nothing_would_read_are_refused(given):
    with pytest.raises(ValueError, match="leave param_groups and implementation out"):
        OrthoshardOptimizers.Config(**given).build(model_parts=parts())
