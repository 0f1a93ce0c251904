"""Weights that are computed from others: what is trained is what the plain layer is, and lengths are scalars."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

from orthoshard import Dion
from orthoshard.params import claims


class Net(nn.Module):
    """Layers of every role, some of which others ask about."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(num_attention_heads=2, hidden_size=8)
        self.tokens = nn.Embedding(20, 8)
        self.qkv_proj = nn.Linear(8, 24)
        self.gate_up_proj = nn.Linear(8, 24)
        self.down_proj = nn.Linear(12, 8)
        self.c_fc = Conv1D(12, 8)
        self.first = nn.Conv1d(1, 6, 3)
        self.kernel = nn.Conv2d(6, 7, 3)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.upsample = nn.ConvTranspose1d(6, 5, 4)
        self.number = nn.Linear(8, 1)
        self.lm_head = nn.Linear(8, 20)


class LowRank(nn.Module):
    """One of the field's own: two factors."""

    def forward(self, U, V):
        return U @ V

    def right_inverse(self, W):
        return W[:, :2].clone(), W[:2].clone()


def low_rank(layer):
    if isinstance(layer, (nn.Linear, nn.Embedding)) and min(layer.weight.shape) > 2:
        parametrize.register_parametrization(layer, "weight", LowRank(), unsafe=True)
    return layer


# (what it does to a layer, the parameters of directions and those of magnitudes that it makes)
WAYS = {
    "weight_norm": (weight_norm, "parametrizations.weight.original1", "parametrizations.weight.original0"),
    "weight_norm of columns": (
        lambda layer: weight_norm(layer, dim=1),
        "parametrizations.weight.original1",
        "parametrizations.weight.original0",
    ),
    "old weight_norm": (old_weight_norm, "weight_v", "weight_g"),
    "old weight_norm of all": (lambda layer: old_weight_norm(layer, dim=None), "weight_v", "weight_g"),
    "spectral_norm": (spectral_norm, "parametrizations.weight.original", None),
    "old spectral_norm": (old_spectral_norm, "weight_orig", None),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original", None),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig", None),
    "weight_norm after spectral_norm": (lambda layer: weight_norm(spectral_norm(layer)), None, None),
}


def facts(model):
    return {claim.name: (claim.role, claim.view, claim.reason) for claim in claims(model)}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_directions_are_what_the_plain_layer_is(way):
    change, direction, magnitude = WAYS[way]
    plain, model = facts(Net()), Net()
    for layer in model.children():
        change(layer)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = facts(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()), "nothing was computed"
    for name, fact in plain.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias":
            assert found[name] == fact
        elif direction is not None:
            assert found[f"{layer}.{direction}"] == fact, name
            if magnitude is not None:
                assert found[f"{layer}.{magnitude}"][0] == "scalar"
        else:
            assert fact in [found[own] for own in found if own.startswith(f"{layer}.")]
    assert Dion(model).plan().entries


def test_the_way_of_a_fused_module_of_torch():
    attention, recurrent = nn.MultiheadAttention(8, 2), nn.GRU(8, 8)
    weight_norm(attention, "in_proj_weight")
    weight_norm(recurrent, "weight_hh_l0")
    name = "parametrizations.{}.original1"
    assert facts(attention)[name.format("in_proj_weight")][:2] == ("matrix", "rows:8,8,8")
    assert facts(recurrent)[name.format("weight_hh_l0")][:2] == ("matrix", "rows:8,8,8")


def test_factors_of_unknown_parametrizations():
    """The longer factor stands for the weight: rows of a table are looked up. The other multiplies."""
    model = Net()
    for layer in model.children():
        low_rank(layer)
    found = facts(model)
    assert found["tokens.parametrizations.weight.original0"][0] == "embedding"
    assert found["tokens.parametrizations.weight.original1"][0] == "matrix"
    assert found["lm_head.parametrizations.weight.original0"][0] == "head"
    assert found["down_proj.parametrizations.weight.original1"][:2] == ("matrix", "whole")


def test_names_alone_do_not_make_a_norm():
    """Parameters that are only called so, and of which no hook makes a weight."""
    model = nn.Module()
    model.register_parameter("w_g", nn.Parameter(torch.zeros(6, 4)))
    model.register_parameter("w_orig", nn.Parameter(torch.zeros(6, 4)))
    assert {role for role, *_ in facts(model).values()} == {"matrix"}


def test_tied_to_an_output_layer_that_is_normalized():
    model = Net()
    model.lm_head.weight = model.tokens.weight
    old_spectral_norm(model.tokens)
    ((role, _, reason),) = [found for name, found in facts(model).items() if name == "tokens.weight_orig"]
    assert role == "embedding"
    assert "tied" in reason


def test_a_normalized_model_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    weight_norm(model[0])
    spectral_norm(model[2])
    optimizer = Dion(model, lr=0.02)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(x), x.roll(1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
