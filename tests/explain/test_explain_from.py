"""`orthoshard explain --from-...`: rates that match AdamW's update in size, checked on real updates; code that runs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from orthoshard import Muon
from orthoshard.lab.explain.adamw import CONVENTIONS, Adamw, Target, advise, code
from orthoshard.lab.explain.cli import main
from orthoshard.lab.explain.match import Matrices, common_lr, matched_decay, matched_lr, matrices_of
from orthoshard.lab.models import describe
from orthoshard.params import claims
from orthoshard.rules import SCALES


def one_update(scale, m, n, lr):
    """Of a real Muon, from zero."""
    weight = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    weight.grad = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([weight], lr=lr, scale=scale, weight_decay=0.0, polar="polar_express", polar_dtype="float64")
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("scale", CONVENTIONS)
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)], ids=str)
def test_entries_of_the_update_are_as_large_as_adamws(scale, shape):
    update = one_update(scale, *shape, matched_lr(3e-4, scale, *shape))
    rms = float(update.square().mean().sqrt())
    assert rms == pytest.approx(0.2 * 3e-4, rel=0.1)  # the polar factor's singular values are 1 to some percent


def test_one_rate_for_all_matches_the_whole_update():
    matrices = [Matrices(64, 16, 3), Matrices(16, 64, 1), Matrices(8, 8, 5)]
    for scale in CONVENTIONS:
        lr = common_lr(3e-4, scale, matrices)
        squares = sum(float(one_update(scale, e.m, e.n, lr).square().sum()) * e.count for e in matrices)
        adamw = sum((0.2 * 3e-4) ** 2 * e.entries for e in matrices)
        assert math.sqrt(squares / adamw) == pytest.approx(1, rel=0.1)
    assert common_lr(3e-4, "rms", matrices) == pytest.approx(3e-4)


def test_decay_shrinks_weights_as_before():
    lr = 5e-3
    assert 1 - lr * matched_decay(3e-4, 0.1, lr) == pytest.approx(1 - 3e-4 * 0.1)


def test_matrices_are_counted_as_blocks_and_experts():
    found = matrices_of([c for c in claims(describe("gpt2").on_meta()) if c.role == "matrix"])
    assert {(e.m, e.n): e.count for e in found} == {(768, 768): 12 * 4, (3072, 768): 12, (768, 3072): 12}
    found = matrices_of([c for c in claims(describe("mixtral-8x7b").on_meta()) if c.role == "experts"])
    assert {(e.m, e.n): e.count for e in found} == {(14336, 4096): 32 * 8 * 2, (4096, 14336): 32 * 8}


def test_the_text(capsys):
    assert main(["--from-adamw", "lr=3e-4", "weight_decay=0.1", "--model", "llama3-8b"]) == 0
    out = capsys.readouterr().out
    for scale, m, n in (("spectral", 4096, 4096), ("spectral", 4096, 14336), ("original", 1024, 4096)):
        assert f"{3e-4 * 0.2 * math.sqrt(max(m, n)) / SCALES[scale](m, n):.3g}" in out
    assert "<- chosen" in next(line for line in out.splitlines() if line.strip().startswith("rms"))
    assert re.search(r"norm +65 +266,240 +0 ", out)
    assert re.search(r"head +1 +525,336,576 +0.1 ", out)


@pytest.mark.parametrize("optimizer", ["dion", "dion_tail", "muon"])
@pytest.mark.parametrize("scale", CONVENTIONS)
def test_the_code_runs_and_keeps_what_adamw_had(optimizer, scale, capsys):
    arguments = ["--from-adamw", "betas=0.9,0.99", "--model", "nano", "--optimizer", optimizer, "--scale", scale]
    arguments += [] if optimizer == "muon" else ["--rank-fraction", "1/8"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    model = describe("nano").on_meta()
    scope = {"model": model}
    exec(out[out.index("from orthoshard import") :], scope)
    groups = {name: group for group in scope["optimizer"].param_groups for name in group["param_names"]}
    embed, norm, matrix = (
        groups[f"model.{name}.weight"] for name in ("embed_tokens", "norm", "layers.0.self_attn.q_proj")
    )
    assert (embed["rule"], embed["lr"], embed["weight_decay"], embed["betas"]) == ("adamw", 3e-4, 0.1, (0.9, 0.99))
    assert (norm["lr"], norm["weight_decay"]) == (3e-4, 0.0)
    assert (matrix["rule"], matrix["scale"]) == (optimizer, scale)
    assert matrix["lr"] * matrix["weight_decay"] == pytest.approx(3e-5, rel=1e-3)
    if optimizer != "muon":
        assert matrix["rank_fraction"] == 0.125


def test_the_code_trains():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    scope = {"model": model}
    exec(code(Adamw(0.05, 0.1, (0.9, 0.95)), Target("muon", "rms"), 0.05, 0.1, {"embedding", "head"}), scope)
    words = torch.arange(16)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(words), words)
        scope["optimizer"].zero_grad()
        loss.backward()
        scope["optimizer"].step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_without_matrices():
    with pytest.raises(ValueError, match="has no matrices"):
        advise("it", list(claims(nn.LayerNorm(4))), Adamw(1e-3, 0.1, (0.9, 0.95)), Target("dion", "rms"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--from-adamw lr=0", "--from-adamw lr=0.0: give a finite number above 0"),
        ("--from-adamw weight_decay=-1", "--from-adamw weight_decay=-1.0"),
        ("--from-adamw betas=0.9,1", "betas=(0.9, 1.0): give two numbers"),
        ("--from-adamw betas=0.9", "give a value such as betas=0.9,0.95"),
        ("--from-adamw momentum=0.9", "the keys are lr, weight_decay, betas"),
        ("--from-adamw --optimizer muon --rank-fraction 1/4", "Muon has no ranks"),
        ("--from-adamw --rank-fraction 3/2", "give a share above 0, at most 1"),
        ("--from-adamw --model llama3-8c", "did you mean 'llama3-8b'"),
        ("--from-adamw --from-dion", "--from-adamw and --from-dion do not go together"),
        ("--from-muon nesterov=perhaps", "give a value such as nesterov=True"),
        ("--from-muon adjust_lr_fn=none", "give one of original"),
        ("--from-dion lr=nan", "lr=nan: give a finite number"),
    ],
)
def test_refusals(arguments, sentence, capsys):
    assert main(arguments.split()) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--optimizer", "dion"], ["--optimizer", "dion_tail", "--rank-fraction", "1/8"]])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_muon_goes_over_and_takes_the_same_first_step(adjust, more, capsys):
    """Beside torch's own: the first step of Muon is equal to what bfloat16 rounds, and what is printed runs."""
    arguments = ["--from-muon", "lr=0.03", "weight_decay=0.2", *([f"adjust_lr_fn={adjust}"] if adjust else []), *more]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    weight = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(16, 48, bias=False)
    model.weight.data.copy_(weight)
    scope = {"model": model}
    exec(out[out.index("from orthoshard import") :], scope)
    ours, theirs = model.weight, nn.Parameter(weight.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    scope["optimizer"].step()
    if not more:
        torch.optim.Muon([theirs], lr=0.03, weight_decay=0.2, adjust_lr_fn=adjust).step()
        assert (ours - theirs).norm() < 0.02 * (theirs - weight).norm()
    assert scope["optimizer"].param_groups[0]["weight_decay"] == 0.2


def test_dion_goes_over_with_its_own_form(capsys):
    assert main(["--from-dion", "lr=0.01", "mu=0.9", "rank_fraction=1/4", "betas=0.9,0.99"]) == 0
    out = capsys.readouterr().out
    scope = {"model": nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 8))}
    exec(out[out.index("from orthoshard import") :], scope)
    group = next(group for group in scope["optimizer"].param_groups if group["rule"] == "dion")
    assert (group["lr"], group["momentum"], group["rank_fraction"], group["q_side"]) == (0.01, 0.9, 0.25, "columns")
    assert group["scale"] == "spectral"
