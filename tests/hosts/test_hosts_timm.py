"""timm's own factory, models and schedules around optimizers of ours that `orthoshard.hosts.timm` made known to it."""

from __future__ import annotations

import importlib
import re
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn.functional import cross_entropy

from orthoshard import Dion, param_groups

with pytest.MonkeyPatch.context() as patch:
    try:  # timm imports torchvision for images, which there are none of here; PyPI's needs torch's CUDA build
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        parts = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms")
        for part in (*parts, ".transforms.functional"):
            patch.setitem(sys.modules, f"torchvision{part}", MagicMock())
    import timm
    from timm.optim import create_optimizer_v2, optimizer_kwargs
    from timm.scheduler import CosineLRScheduler

from orthoshard.hosts.timm import NAMES, register

PAGE = Path(__file__).parents[2] / "docs/frameworks.md"
VIT = ("vit_tiny_patch16_224", {"depth": 2, "img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2})
OPTIMIZERS = ("adamw", "dion", "dion")  # timm's own, and ours with and without a schedule
CONVNEXT = ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (64, 64, 64, 64)})


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def made(kind=VIT):
    torch.manual_seed(0)
    name, sizes = kind
    return timm.create_model(name, num_classes=5, **sizes)


def by_name(optimizer):
    """Every key of its group, of each parameter."""
    keys = {}
    for group in optimizer.param_groups:
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        keys |= dict.fromkeys(group["param_names"], rest)
    return keys


def rates(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", [VIT, CONVNEXT], ids=["ViT", "ConvNeXt"])
def test_what_the_page_says_has_the_groups_of_a_bare_model(kind):
    (block,) = re.findall(r"^```python\n(from timm.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    spoken = {"model": made(kind)}
    exec(block, spoken)
    keys = by_name(spoken["optimizer"])
    assert keys == by_name(Dion(made(kind), lr=0.02, weight_decay=0.05, rank_fraction=0.25))
    roles = {name: group["role"] for name, group in keys.items()}
    if kind is VIT:
        assert roles["pos_embed"] == "position"
        assert roles["patch_embed.proj.weight"] == "embedding"
        assert roles["head.weight"] == "head"
        assert roles["blocks.0.attn.qkv.weight"] == "matrix"
    else:
        assert roles["head.fc.weight"] == "head"
        assert roles["stages.0.blocks.0.mlp.fc1.weight"] == "matrix"


@pytest.mark.parametrize("name", NAMES)
def test_the_train_script_names_every_optimizer(name):
    said = Namespace(opt=name, lr=0.01, weight_decay=2e-5, momentum=0.9, opt_eps=None, opt_betas=None, layer_decay=None)
    optimizer = create_optimizer_v2(made(), **optimizer_kwargs(cfg=said), scalar_lr=0.003)
    assert type(optimizer) is NAMES[name]
    (matrices, *_) = [group for group in optimizer.param_groups if group["role"] == "matrix"]
    assert (matrices["lr"], matrices["weight_decay"]) == (0.01, 2e-5)
    assert matrices["momentum"] == NAMES[name](made()).defaults["momentum"], "timm's 0.9, which nobody said"
    assert by_name(optimizer)["head.weight"]["lr"] == 0.003
    assert type(create_optimizer_v2(made(), opt="muon")) is timm.optim.Muon


def test_momentum_is_said_where_they_are_registered():
    register(momentum=0.8)
    assert by_name(create_optimizer_v2(made(), opt="dion"))["blocks.0.mlp.fc1.weight"]["momentum"] == 0.8
    register()


@pytest.mark.parametrize(
    ("kind", "given"),
    [(VIT, {"layer_decay_no_opt_scale": 0.4}), (VIT, {}), (CONVNEXT, {"layer_decay_min_scale": 0.2})],
)
def test_layers_learn_at_timms_rates_with_and_without_its_schedule(kind, given):
    models = [made(kind) for _ in range(3)]
    given = {"lr": 0.5, "weight_decay": 0.05, "layer_decay": 0.7, **given}
    timms, bare, scheduled = (create_optimizer_v2(m, opt=o, **given) for m, o in zip(models, OPTIMIZERS, strict=True))
    schedules = [CosineLRScheduler(optimizer, t_initial=10) for optimizer in (timms, scheduled)]
    expected = rates(models[0], timms)
    assert rates(models[1], bare) == pytest.approx(expected)
    assert len(set(expected.values())) > 2
    for schedule in schedules:
        schedule.step(4)
    assert rates(models[2], scheduled) == pytest.approx(rates(models[0], timms))
    assert rates(models[2], scheduled) != pytest.approx(expected)
    whole = by_name(Dion(made(kind), weight_decay=0.05))
    for name, group in by_name(bare).items():
        assert group | {"lr": None} == whole[name] | {"lr": None}


def train(model, optimizer, steps):
    for step in steps:
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("given", [{"opt": "lookahead_dion"}, {"opt": "diontail", "layer_decay": 0.7}])
def test_a_resumed_run_is_the_same(given):
    straight, resumed = made(), made()
    optimizer = create_optimizer_v2(straight, lr=0.02, **given)
    train(straight, optimizer, range(7))
    resumed.load_state_dict(straight.state_dict())
    second = create_optimizer_v2(resumed, lr=0.02, **given)
    second.load_state_dict(optimizer.state_dict())
    train(straight, optimizer, range(7, 13))
    train(resumed, second, range(7, 13))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"betas": (0.9, 0.99)}, "set scalar_betas"),
        ({"eps": 1e-8}, "key 'eps' means nothing to rule 'dion'"),
        ({"rank": 0.25}, "did you mean 'rank_fraction'"),
        ({"fallback_list": ["head.*"]}, r"fallback_list.*leave them out, or .*param_group_fn=partial"),
        ({"fallback_no_weight_decay": True}, r"fallback_no_weight_decay.*leave them out"),
        ({"param_group_fn": lambda model: model.parameters()}, r"no matrix.*Dion\(model\)"),
    ],
)
def test_what_nothing_would_read_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_optimizer_v2(made(), opt="dion", **given)


def test_groups_that_are_made_already_stay():
    groups = param_groups(made(), overrides={"head.weight": {"role": "matrix"}})
    for how in ({"model_or_params": groups}, {"model_or_params": made(), "param_group_fn": lambda model: groups}):
        assert by_name(create_optimizer_v2(opt="dion", **how))["head.weight"]["rule"] == "dion"
    assert by_name(timm.optim.get_optimizer_class("dion")(made(), lr=0.1)) == by_name(Dion(made(), lr=0.1))
