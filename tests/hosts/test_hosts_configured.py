"""Hosts whose optimizer is named in a configuration: axolotl and verl, with what `docs/frameworks.md` says to write.

Neither is installed with the others, since they ask for hundreds of packages. Where they are missing, what they do with
an optimizer is written out here; where they are there, their own code does it.
"""

from __future__ import annotations

import copy
import importlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import orthoshard
from orthoshard import Dion
from orthoshard.hosts.huggingface import RuleFactory
from processes import run_processes

yaml = pytest.importorskip("yaml")
PAGE = Path(__file__).parents[2] / "docs/frameworks.md"
DATA = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(1))


def configuration(host):
    """The block of YAML on the page that is of this host."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if f"orthoshard.hosts.{host}" in block]
    return yaml.safe_load(block)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.up, self.down = nn.Embedding(12, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, words, x):
        return self.down(torch.tanh(self.up(self.embed_tokens(words) + x)))


def net():
    torch.manual_seed(0)
    return Net()


def roles(optimizer):
    return {group["role"]: (group["rule"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}


class Config(dict):
    """As axolotl's: what is not there is None."""

    __getattr__ = dict.get


@pytest.fixture
def axolotl(monkeypatch):
    """Our module for axolotl, on a base class of plugins without methods where axolotl is missing."""
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = object
        for name, module in {"axolotl": ModuleType("axolotl"), "axolotl.integrations": ModuleType("i")}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    yield importlib.import_module("orthoshard.hosts.axolotl")
    sys.modules.pop("orthoshard.hosts.axolotl")


def axolotl_trains(module, config):
    """axolotl 0.19: train.py calls the hook of plugins with its trainer; core/trainers/mixins/optimizer.py the factory,
    which it takes for one as the Trainer does."""
    is_optimizer_factory = pytest.importorskip("transformers.trainer_optimizer").is_optimizer_factory
    trainer = SimpleNamespace(model=net(), args=object(), optimizer_cls_and_kwargs=config.pop("given", None))
    plugin = module.OrthoshardPlugin()
    home, _, arguments = plugin.get_input_args().rpartition(".")
    getattr(sys.modules[home], arguments)(orthoshard=config.get("orthoshard"))
    plugin.post_trainer_create(config, trainer)
    factory, options = trainer.optimizer_cls_and_kwargs
    assert is_optimizer_factory(factory)
    return factory()(trainer.model, trainer.args, **options)


def test_axolotl_trains_with_what_its_configuration_says(axolotl):
    config = configuration("axolotl")
    assert config["plugins"] == [f"{axolotl.__name__}.OrthoshardPlugin"]
    optimizer = axolotl_trains(axolotl, Config(config, weight_decay=0.1))
    assert roles(optimizer)["matrix"] == ("dion", config["learning_rate"], 0.1)
    assert roles(optimizer)["embedding"][0] == "adamw"
    assert optimizer.param_groups[1]["rank_fraction"] == config["orthoshard"]["rank_fraction"]


def test_axolotls_rates_give_way_to_those_of_the_plugin(axolotl):
    own = {"rule": "muon", "lr": 0.05, "weight_decay": 0.3}
    optimizer = axolotl_trains(axolotl, Config(learning_rate="2e-4", weight_decay=0.1, orthoshard=own))
    assert roles(optimizer)["matrix"] == ("muon", 0.05, 0.3)
    assert roles(axolotl_trains(axolotl, Config(learning_rate="2e-4")))["matrix"][:2] == ("dion", 2e-4)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config(learning_rate=0.1, optimizer="muon", given=(object, {})), r"optimizer: muon.*leave out one"),
        (Config(learning_rate=0.1, embedding_lr=0.1, lr_groups=[]), r"embedding_lr, lr_groups: not read"),
        (Config(learning_rate=0.1, orthoshard={"dion_lr": 0.1}), "dion_lr"),
        (Config(learning_rate=0.1, orthoshard={"shard_state": "zero1"}), r"shard_state=.*Trainer"),
    ],
)
def test_what_nothing_would_read_is_refused_in_axolotl(axolotl, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        axolotl_trains(axolotl, config)


def verl_builds(parameters, config):
    """verl 0.9, workers/config/optimizer.py: `build_optimizer`, called with ``module.parameters()``."""
    try:
        build_optimizer = importlib.import_module("verl.workers.config.optimizer").build_optimizer
    except ImportError:
        arguments = {"lr": config.lr, "weight_decay": config.weight_decay} | (config.override_optimizer_config or {})
        return getattr(importlib.import_module(config.optimizer_impl), config.optimizer)(parameters, **arguments)
    return build_optimizer(parameters, config)


def optim(**changes):
    given = configuration("verl")["actor_rollout_ref"]["actor"]["optim"]
    return SimpleNamespace(**{"weight_decay": 0.01, "override_optimizer_config": None, **given, **changes})


def test_verl_trains_with_what_its_configuration_says():
    config = optim(weight_decay=0.1)
    optimizer = verl_builds(net().parameters(), config)
    assert type(optimizer) is Dion
    assert roles(optimizer)["matrix"] == ("dion", config.lr, 0.1)
    assert roles(optimizer)["embedding"][0] == "adamw"
    (matrices,) = [group for group in optimizer.param_groups if group["role"] == "matrix"]
    assert matrices["rank_fraction"] == config.override_optimizer_config["rank_fraction"]
    assert matrices["param_names"] == ["up.weight", "down.weight"]


@pytest.mark.parametrize("name", ["Dion", "Dion3", "DionTail", "Muon", "NorMuon", "RowNorm", "LoRAMuon"])
def test_every_optimizer_can_be_named(name):
    config = optim(optimizer=name, override_optimizer_config={})
    assert type(verl_builds(net().parameters(), config)) is getattr(orthoshard, name)


def started(model):
    parameters = model.parameters()
    next(parameters)
    return parameters


@pytest.mark.parametrize("given", [lambda model: list(model.parameters()), started, lambda model: iter([])])
def test_parameters_that_forgot_their_module_are_refused(given):
    with pytest.raises(ValueError, match=r"module\.parameters\(\).*orthoshard\.Dion\(module\)"):
        verl_builds(given(net()), optim())


def moved(optimizer):
    """verl 0.9, utils/fsdp_utils.py: with ``optimizer_offload`` every tensor of state goes to the host and back, and
    another tensor is there then."""
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone() if isinstance(value, torch.Tensor) else value


def stopped_and_not(rank, config):
    """Weights after six steps in one go, and after three, a checkpoint and three, with state moved after each. The
    checkpoint is verl's (utils/checkpoint/fsdp_checkpoint_manager.py): `state_dict` of every rank, pickled."""

    def made():
        model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
        return model, verl_builds(model.parameters(), config)

    def train(model, optimizer, steps, move):
        own = slice(rank * 4, rank * 4 + 4)
        for step in steps:
            model(torch.arange(8)[own], DATA[step][own]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if move:
                moved(optimizer)

    straight, first, second = made(), made(), made()
    train(*straight, range(6), move=False)
    train(*first, range(3), move=True)
    file = io.BytesIO()
    torch.save(first[1].state_dict(), file)
    file.seek(0)
    second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    second[1].load_state_dict(torch.load(file, weights_only=False))
    train(*second, range(3, 6), move=True)
    return [[p.to_local().tolist() for p in run[0].parameters()] for run in (straight, second)]


def test_under_fsdp2_with_state_that_comes_and_goes_and_a_checkpoint_in_between():
    given = optim().override_optimizer_config
    configs = [optim(override_optimizer_config=given | more) for more in ({}, {"state_dtype": "int8"})]
    for results in run_processes(2, [(stopped_and_not, (config,)) for config in configs]):
        for straight, resumed in results:
            assert straight == resumed


def test_any_rule_by_its_name():
    assert roles(RuleFactory()(net(), rule="normuon", lr=0.01))["matrix"][:2] == ("normuon", 0.01)
