"""Scripts for microsoft/dion, with the import changed alone; trajectories beside its arithmetic; its checkpoints."""

from __future__ import annotations

import copy
import math
import pickle

import arithmetic
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from orthoshard import RuleOptimizer
from orthoshard.compat import dion
from simulate import simulate

# As in its README: "Building Parameter Groups".
SCRIPT = """
import math
import torch
from torch import nn
from dion import {name}

class TransformerModel(nn.Module):
    def __init__(self, vocab_dim=32, model_dim=8):
        super().__init__()
        self.embedding = nn.Embedding(vocab_dim, model_dim)
        self.blocks = nn.ModuleList([nn.Linear(model_dim, model_dim) for _ in range(3)])
        self.lm_head = nn.Linear(model_dim, vocab_dim)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.lm_head(x)

torch.manual_seed(0)
lr, model = 0.01, TransformerModel()
matrix_params = list(p for p in model.blocks.parameters() if p.ndim == 2)
vector_params = list(p for p in model.blocks.parameters() if p.ndim != 2)
embed_params = list(model.embedding.parameters())
lm_head_params = list(model.lm_head.parameters())

param_groups = [
    dict(params=matrix_params),
    dict(params=vector_params, algorithm="adamw"),
    dict(params=embed_params, algorithm="lion", weight_decay=0),
    dict(params=lm_head_params, algorithm="adamw", lr=lr / math.sqrt(8), weight_decay=0),
]
optimizer = {name}(param_groups, lr=lr, weight_decay=0.1{more})
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

tokens = torch.arange(33) % 32
losses = []
for _ in range(30):
    loss = nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:])
    loss.backward()
    optimizer.step()
    scheduler.step()
    model.zero_grad()
    losses.append(loss.item())
"""
NAMES = {"Dion": ", rank_fraction=0.25, rank_multiple_of=2", "Dion2": "", "Dion3": "", "Muon": "", "NorMuon": ""}


def run(name, more=""):
    space = {}
    text = SCRIPT.format(name=name, more=more).replace("from dion import", "from orthoshard.compat.dion import")
    exec(compile(text, "script", "exec"), space)
    return space


@pytest.mark.parametrize("name", NAMES)
def test_its_readme_with_the_import_changed_alone(name):
    space = run(name, NAMES[name])
    assert space["losses"][-1] < space["losses"][0] - 0.3
    groups = space["optimizer"].param_groups
    assert [g["rule"] for g in groups][1:] == ["adamw", "lion", "adamw"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0, 0]
    assert [g["initial_lr"] for g in groups] == [0.01, 0.01, 0.01, 0.01 / math.sqrt(8)]
    assert groups[1]["betas"] == groups[2]["betas"] == (0.9, 0.95)


def gradients(shape, steps=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


RULES = {
    "Dion": (dion.Dion, arithmetic.Dion, {"rank_fraction": 0.5}, {}),
    "Dion2": (dion.Dion2, arithmetic.Dion2, {}, {}),
    "Dion2, half": (dion.Dion2, arithmetic.Dion2, {"fraction": 0.5, "ef_decay": 0.9}, {"fraction": 0.5, "mu": 0.9}),
    "Dion3": (dion.Dion3, arithmetic.Dion3, {}, {}),
    "Muon": (dion.Muon, arithmetic.Muon, {}, {}),
    "Muon, Nesterov, rms": (
        dion.Muon, arithmetic.Muon, {"nesterov": True, "adjust_lr": "rms_norm"},
        {"nesterov": True, "adjust": "rms_norm"},
    ),
    "Muon, unadjusted": (dion.Muon, arithmetic.Muon, {"adjust_lr": None}, {"adjust": None}),
    "Muon, Newton-Schulz": (
        dion.Muon, arithmetic.Muon, {"use_polar_express": False},
        {"polar": lambda X: arithmetic.newton_schulz(X, arithmetic.QUINTIC)},
    ),
    "NorMuon": (dion.NorMuon, arithmetic.NorMuon, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("rule", RULES)
def test_trajectories_are_its_arithmetic(rule, shape):
    ours, theirs, options, own = RULES[rule]
    W = gradients(shape, 1)[0]
    p = nn.Parameter(W.clone())
    optimizer = ours([p], lr=0.03, weight_decay=0.2, **options)
    optimizer.initialize_state()
    if rule == "Dion":
        own = {"Q": optimizer.state[p]["Q"].clone()}
        assert len(own["Q"]) == min(shape)
    oracle = theirs(W, lr=0.03, wd=0.2, **own)
    for G in gradients(shape):
        p.grad = G
        optimizer.step()
        oracle.step(G)
    assert (p - oracle.W).norm() < 1e-6 * (oracle.W - W).norm()


@pytest.mark.parametrize(("algorithm", "oracle"), [("adamw", arithmetic.AdamW), ("lion", arithmetic.Lion)])
def test_what_is_no_matrix_has_the_optimizers_own_defaults(algorithm, oracle):
    W = gradients((7,), 1)[0]
    p = nn.Parameter(W.clone())
    optimizer = dion.Dion2([{"params": [p], "algorithm": algorithm}], lr=0.02, betas=(0.8, 0.9))
    expected = oracle(W, lr=0.02, betas=(0.8, 0.9))
    for G in gradients((7,)):
        p.grad = G
        optimizer.step()
        expected.step(G)
    assert torch.allclose(p, expected.W, rtol=0, atol=1e-12)


def test_heads_fused_blocks_kernels_and_experts_are_matrices_of_their_own():
    shapes = [(12, 5), (6, 4, 3, 3), (2, 6, 4), (2, 2, 5, 4)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = dion.Muon(
        [{"params": parameters[0], "num_heads": 3}, {"params": parameters[1:2], "flatten": True},
         {"params": parameters[2:]}, {"params": [nn.Parameter(torch.ones(9, 4))], "split_sizes": (5, 2, 2)}]
    )  # fmt: skip
    assert [group["view"] for group in optimizer.param_groups] == ["rows:3*4", "conv", "whole", "stack", "rows:5,2,2"]


def theirs_state_dict(groups):
    """What theirs saves: ``groups`` of (keys, [state of each parameter])."""
    saved, state, number = [], {}, 0
    for keys, members in groups:
        saved.append({"lr": 0.05, "weight_decay": 0.3, "epsilon": 1e-8, "beta1": 0.7, "beta2": 0.8, "step": 4, **keys})
        saved[-1]["params"] = list(range(number, number + len(members)))
        state |= {number + i: held for i, held in enumerate(members)}
        number += len(members)
    return {"state": state, "param_groups": saved}


def test_its_checkpoints_convert():
    wide, tall = gradients((4, 6), 1)[0], gradients((6, 4), 1)[0]
    Q, v = gradients((4, 2), 1)[0], gradients((5,), 1)[0].abs()
    saved = theirs_state_dict(
        [
            ({"algorithm": "dion", "mu": 0.8, "rank_fraction": 0.5, "rank_multiple_of": 1, "initial_lr": 1.0},
             [{"momentum": wide, "Q": Q}, {"momentum": tall, "Q": Q}]),
            ({"algorithm": "adamw"}, [{"momentum": v, "variance": 2 * v}]),
            ({"algorithm": "lion"}, [{"momentum": 3 * v}]),
        ]
    )  # fmt: skip
    parameters = [nn.Parameter(torch.zeros_like(x)) for x in (wide, tall, v, v)]
    groups = [{"params": parameters[:2]}] + [
        {"params": [p], "algorithm": a} for p, a in zip(parameters[2:], ("adamw", "lion"), strict=True)
    ]
    optimizer = dion.Dion(groups, rank_fraction=0.5)
    optimizer.load_state_dict(saved)
    states = [optimizer.state[p] for p in parameters]
    assert torch.equal(states[0]["momentum"], wide)
    assert torch.equal(states[1]["Q"], Q)
    assert torch.equal(states[2]["exp_avg_sq"], 2 * v)
    assert states[2]["step"] == 4
    assert torch.equal(states[3]["exp_avg"], 3 * v)
    first, second = optimizer.param_groups[:2]
    assert (first["lr"], first["momentum"], first["initial_lr"], second["betas"]) == (0.05, 0.8, 1.0, (0.7, 0.8))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())  # ours, as ever
    with pytest.raises(ValueError, match="4 parameters, and the optimizer has 2"):
        dion.Dion(parameters[:2]).load_state_dict(saved)


def test_normuon_rows_of_its_checkpoint_and_what_does_not_fit():
    M, v = gradients((4, 6), 1)[0], gradients((4, 1), 1)[0].abs()
    saved = theirs_state_dict([({"algorithm": "normuon", "mu": 0.9}, [{"momentum": M, "variance_neuron": v}])])
    p = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = dion.NorMuon([p])
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[p]["row_moment"], v.squeeze())
    rows = theirs_state_dict([({"algorithm": "dion", "mu": 0.9}, [{"momentum": M, "Q": torch.ones(6, 4)}])])
    with pytest.raises(ValueError, match="state 'Q'"):
        dion.Dion([p]).load_state_dict(rows)
    dion.Dion([p], q_side="columns").load_state_dict(rows)


def test_a_group_that_is_added_later_and_a_copy():
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = pickle.loads(pickle.dumps(dion.Muon([p], lr=0.5, betas=(0.6, 0.7))))
    optimizer.add_param_group({"params": [q], "algorithm": "adamw"})
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["betas"]) == (0.5, (0.6, 0.7))


WRONG = {
    "an algorithm of another": ({"algorithm": "muon"}, {}, "algorithm='muon' is unknown here"),
    "a function": ({}, {"newton_schulz_func": len}, "newton_schulz_func cannot be saved"),
    "a slip": ({"weight_deccay": 1.0}, {}, "did you mean 'weight_decay'"),
    "a scale": ({}, {"adjust_lr": "rms"}, "adjust_lr='rms' is unknown"),
    "heads that do not fit": ({"num_heads": 3}, {}, "rows:3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_has_no_equal_is_refused_with_the_fix(wrong):
    keys, options, sentence = WRONG[wrong]
    with pytest.raises(ValueError, match=sentence):
        dion.Dion2([{"params": [nn.Parameter(torch.ones(4, 4))], **keys}], **options)


def test_mixed_precision():
    def build(**dtypes):
        return dion.Dion(
            [nn.Parameter(torch.ones(4, 4))], mixed_precision_config=dion.DionMixedPrecisionConfig(**dtypes)
        )

    half = torch.bfloat16
    assert build(momentum_dtype=half, Q_dtype=half, variance_dtype=torch.float32).defaults["state_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="one dtype"):
        build(momentum_dtype=half)
    with pytest.raises(ValueError, match="averages"):
        build(variance_dtype=half)


torch.manual_seed(0)  # here, since simulated ranks are threads and share the generator
NET = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()


def net():
    return copy.deepcopy(NET)


def trained(model, optimizer, rank=0, world=1):
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = model(x[rank::world]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_fsdp2_with_the_mesh_it_asks_for_takes_the_steps_of_one_process(name):
    model = net()
    expected = trained(model, getattr(dion, name)(model.parameters()))

    def sharded(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
        model = fully_shard(net(), mesh=mesh)
        argument = "outer_shard_mesh" if name == "Dion" else "distributed_mesh"
        optimizer = getattr(dion, name)(model.parameters(), **{argument: mesh["shard"]})
        for got, want in zip(trained(model, optimizer), expected, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-9)

    simulate(2, sharded)


def test_replicas_with_gradients_of_their_own_and_meshes_that_are_not_the_parameters():
    model = net()
    expected = trained(model, dion.Dion(model.parameters(), rank_fraction=0.5))

    def own(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fs"))
        model = fully_shard(net(), mesh=mesh["fs"])
        parameters = list(model.parameters())
        optimizer = dion.Dion(parameters, replicate_mesh=mesh["dp"], outer_shard_mesh=mesh["fs"], rank_fraction=0.5)
        assert optimizer.param_groups[0]["replica_sync"] == "auto"
        got = trained(model, optimizer, rank=mesh["dp"].get_local_rank(), world=2)
        optimizer.synchronize_for_checkpoint()
        with pytest.raises(ValueError, match=r"sharded over mesh axis 'fs'.*not over distributed_mesh"):
            dion.Muon(parameters, distributed_mesh=mesh["dp"])
        with pytest.raises(ValueError, match="2 dimensions"):
            dion.Muon(parameters, distributed_mesh=mesh)
        with pytest.raises(TypeError, match="distributed_mesh is a str"):
            dion.Muon(parameters, distributed_mesh="fs")
        both = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(0)]))
        with pytest.raises(ValueError, match="sharded over mesh axis 'dp'"):
            dion.Dion([both], outer_shard_mesh=mesh["fs"])
        hybrid = fully_shard(net(), mesh=mesh)
        with pytest.raises(ValueError, match="replicate_mesh_grad_sync=False"):
            dion.Dion(hybrid.parameters(), replicate_mesh=mesh["dp"], outer_shard_mesh=mesh["fs"])
        dion.Dion(hybrid.parameters(), mesh["dp"], mesh["fs"], replicate_mesh_grad_sync=False)
        for mine, whole in zip(got, expected, strict=True):
            assert torch.allclose(mine, whole, rtol=0, atol=1e-9)

    simulate(4, own)


def test_ddp_process_group():
    def replicas(rank):
        p = nn.Parameter(gradients((6, 4), 1)[0])
        optimizer = dion.Muon([p], distributed_mesh=dist.group.WORLD)
        assert optimizer.process_group is dist.group.WORLD
        p.grad = gradients((6, 4), 1)[0]
        optimizer.step()
        return p.detach()

    first, second = simulate(2, replicas)
    assert torch.equal(first, second)


def test_blocks_of_different_shorter_sides_are_refused_at_once():
    parameter = nn.Parameter(torch.randn(64, 32))
    with pytest.raises(ValueError, match="choose q_side='rows' or q_side='columns'"):
        RuleOptimizer([{"params": [parameter], "view": "rows:48,16"}], rule="dion", q_side="shorter")
