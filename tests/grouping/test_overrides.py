"""The user's word over the grouping: ordered patterns, and what is wrong with them."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from orthoshard import Dion, Muon, RuleOptimizer, param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 40, bias=False)


def group_of(groups, name):
    (found,) = [group for group in groups if name in group["param_names"]]
    return found


def test_the_first_pattern_that_matches_wins():
    groups = param_groups(
        Net(),
        lr=0.02,
        rank_fraction=0.5,
        weight_decay=0.1,
        overrides={"up.weight": {"rule": "adamw"}, "*.weight": {"lr_factor": 0.5}},
    )
    up, down, embed, bias = (group_of(groups, n) for n in ("up.weight", "down.weight", "embed.weight", "up.bias"))
    assert up["rule"] == "adamw"
    assert up["lr"] == 0.02
    assert "rank_fraction" not in up
    assert "view" not in up
    assert down["lr"] == pytest.approx(0.01)
    assert down["rank_fraction"] == 0.5
    assert embed["lr"] == pytest.approx(0.01)  # half of the base rate
    assert bias["lr"] == 0.02
    assert "'up.weight'" in up["reason"]
    optimizer = Dion(groups)
    assert group_of(optimizer.param_groups, "up.weight")["weight_decay"] == 0.0


def test_a_role_brings_its_keys():
    groups = param_groups(
        Net(), matrix="dion", overrides={"head*": {"role": "matrix"}, "down.weight": {"role": "head"}}
    )
    assert group_of(groups, "head.weight")["rule"] == "dion"
    assert group_of(groups, "down.weight")["rule"] == "adamw"
    assert group_of(groups, "down.weight")["betas"] == (0.95, 0.98)


def test_a_matrix_rule_on_request_sees_a_kernel_as_a_matrix():
    groups = param_groups(Net(), overrides=[("conv.weight", {"rule": "muon"})])
    assert group_of(groups, "conv.weight")["view"] == "conv"
    assert Muon(groups)


def test_settings_without_lr_follow_the_optimizer():
    groups = param_groups(Net(), matrix="dion", overrides={"up.weight": {"lr_factor": 3.0}, "head*": {"lr": 0.5}})
    optimizer = Dion(groups, lr=0.1)
    assert group_of(optimizer.param_groups, "up.weight")["lr"] == pytest.approx(0.3)
    assert group_of(optimizer.param_groups, "down.weight")["lr"] == 0.1
    assert group_of(optimizer.param_groups, "head.weight")["lr"] == 0.5
    assert group_of(optimizer.param_groups, "embed.weight")["lr"] == 0.1


def test_a_scalar_rate_stays_the_users():
    groups = param_groups(Net(), lr=0.02, scalar_lr=1e-3, overrides={"head*": {"lr_factor": 2.0}})
    assert group_of(groups, "embed.weight")["lr"] == 1e-3
    assert group_of(groups, "head.weight")["lr"] == 2e-3


def test_an_optimizer_of_one_elementwise_rule_takes_the_groups():
    model = Net()
    optimizer = RuleOptimizer(param_groups(model), rule="adamw")
    sum((p**2).sum() for p in model.parameters()).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        ({"up.wieght": {"lr": 1.0}}, ValueError, "the pattern 'up.wieght' matches no .*'up.weight'"),
        ({"*.uo.*": {"lr": 1.0}}, ValueError, "matches no parameter; near it are 'up"),
        ({"*": {"lr": 1.0}, "up.weight": {}}, ValueError, "all that the pattern 'up.weight' matches is taken by"),
        ({"up.weight": 3}, TypeError, "is no dict of group keys"),
        (["up.weight"], TypeError, "a pattern and its settings are needed"),
        ({"up.weight": {"role": "matrxi"}}, ValueError, "role 'matrxi' .* is unknown"),
        ({"up.weight": {"rule": "adan"}}, ValueError, "'adan' is unknown"),
        ({"up.weight": {"params": []}}, ValueError, "sets 'params', which the grouping itself fills"),
    ],
    ids=lambda value: str(value) if isinstance(value, (dict, list)) else "",
)
def test_what_cannot_be_meant_is_refused(overrides, error, sentence):
    with pytest.raises(error, match=sentence):
        param_groups(Net(), overrides=overrides)


def test_an_unknown_key_is_refused_by_the_optimizer():
    with pytest.raises(ValueError, match=re.escape("did you mean 'rank_fraction'?")):
        Dion(param_groups(Net(), overrides={"up.weight": {"rank_fractoin": 0.5}}))


def test_frozen_parameters_have_groups_like_others():
    model = Net()
    whole = [group["param_names"] for group in param_groups(model, overrides={"up.*": {"lr": 1.0}})]
    model.up.requires_grad_(False)
    assert [group["param_names"] for group in param_groups(model, overrides={"up.*": {"lr": 1.0}})] == whole


class Stacks(nn.Module):
    """A table and a head, which go to AdamW as they should, and whatever else ``shapes`` names."""

    def __init__(self, **shapes):
        super().__init__()
        self.embed = nn.Embedding(1000, 8)
        self.layers = nn.ModuleList(nn.ParameterDict() for _ in range(3))
        for layer in self.layers:
            for name, shape in shapes.items():
                layer[name] = nn.Parameter(torch.zeros(shape))
        self.lm_head = nn.Linear(8, 1000)


LARGE = {"up": (16, 16), "odd": (2, 2, 8, 16)}


def warned(make, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(*args, **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("make", [Dion, Muon, param_groups])
def test_a_large_share_under_the_scalar_rule_is_said_once_with_its_names(make):
    (said,) = warned(make, Stacks(**LARGE))
    rule = "muon" if make is Muon else "dion"
    assert "67% of the entries" in said
    assert "'layers.*.odd' (2×2×8×16)." in said
    assert f"overrides={{'layers.*.odd': {{'rule': '{rule}', 'view': 'stack'}}}}" in said
    line = {"layers.*.odd": {"rule": rule, "view": "stack"}}
    groups = param_groups(Stacks(**LARGE), overrides=line)
    assert group_of(Dion(groups).param_groups, "layers.1.odd")["view"] == "stack"
    assert len(warned(Dion, Stacks(**{f"odd{i}": (2, 2, 8, 16) for i in range(10)}))[0].split("layers.*.odd")) == 10


def transposed_kernels():
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 2))


def filters():
    """As many as ConvNeXt has."""
    return nn.Sequential(nn.Conv2d(64, 64, 7, groups=64), nn.Linear(64, 256), nn.Linear(256, 64))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dion(Stacks(up=(16, 16), flat=(5, 4, 3))), "'layers.*.flat'"),
        (lambda: Dion(transposed_kernels()), "'view': 'conv'"),
        (lambda: param_groups(Stacks(**LARGE), overrides={"*.odd": {"rule": "adamw"}}), ""),
        (lambda: param_groups(Stacks(**LARGE), overrides={"*.odd": {"rule": "muon"}}), ""),
        (lambda: RuleOptimizer(Stacks(**LARGE), rule="adamw"), ""),
        (lambda: Dion(Stacks(up=(16, 16), relative_pos=(2, 2, 8, 16))), ""),
        (lambda: Dion(filters()), ""),
        (lambda: Dion(nn.Embedding(100, 8)), ""),
    ],
)
def test_what_is_said_of_and_what_is_not(make, words):
    said = warned(make)
    assert len(said) == bool(words)
    assert words in "".join(said)


def test_a_stack_of_an_unknown_name_is_one_on_request():
    groups = param_groups(Stacks(**LARGE), overrides={"*.odd": {"role": "experts"}})
    assert group_of(groups, "layers.0.odd")["view"] == "stack"
    assert Muon(groups)


@pytest.mark.parametrize(("scalar", "share"), [("adamw", 1.0), ("lion", 1 / 3)])
@pytest.mark.parametrize("rule", [Dion, Muon])
@pytest.mark.parametrize("scale", ["spectral", "rms"])
def test_the_scalar_rule_has_the_matrices_rate_or_a_share_of_it(rule, scalar, share, scale):
    for optimizer in (
        rule(Net(), lr=3e-4, scale=scale, scalar=scalar),
        rule(param_groups(Net(), scale=scale, scalar=scalar), lr=3e-4),
        rule(param_groups(Net(), scale=scale, scalar=scalar, lr=3e-4)),
    ):
        assert group_of(optimizer.param_groups, "up.weight")["lr"] == 3e-4
        assert group_of(optimizer.param_groups, "embed.weight")["lr"] == pytest.approx(3e-4 * share)
