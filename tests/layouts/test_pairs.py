"""LoRAMuon: PEFT's factors beside the paper's formulas in float64, on one process, under FSDP2 and on other layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from first_step import comparison_bytes
from table import LAYOUTS, local, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from orthoshard import LoRAMuon, Muon, RuleOptimizer, param_groups
from orthoshard.budget import agreement_bytes, step_cost
from processes import run_processes
from simulate import simulate

RATE, DECAY, MU = 0.05, 0.1, 0.9


def root(S):
    """S^-½ with the damping of Algorithm 4, by eigenvalues."""
    if not S.norm():
        return torch.zeros_like(S)
    values, vectors = torch.linalg.eigh(S + 1e-5 * S.norm() * torch.eye(len(S), dtype=S.dtype))
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def newton_schulz(X):
    if not X.norm():
        return X
    X, tall = X / X.norm(), X.shape[0] > X.shape[1]
    X = X.T if tall else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if tall else X


class Oracle:
    """Algorithm 1 of arXiv 2606.12921 on B (m, r), A (r, n): W = B A."""

    def __init__(self, B, A, scale):
        self.B, self.A, self.scale = B.double().clone(), A.double().clone(), scale
        self.M = [torch.zeros_like(self.B), torch.zeros_like(self.A)]

    def step(self, GB, GA):
        self.M = [MU * M + G.double() for M, G in zip(self.M, (GB, GA), strict=True)]
        RB, RA = root(self.B.T @ self.B), root(self.A @ self.A.T)
        s = (1 - RATE * DECAY) ** 0.5
        UB, UA = newton_schulz(self.M[0] @ RA) @ RA, RB @ newton_schulz(RB @ self.M[1])
        self.B = s * self.B - RATE * self.scale / (2 * s) * UB
        self.A = s * self.A - RATE * self.scale / (2 * s) * UA


class Lora(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, inputs, outputs, r, generator):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs, bias=False).double().requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, r, bias=False).double()})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, outputs, bias=False).double()})
        with torch.no_grad():
            for p in (self.base_layer.weight, self.lora_A["default"].weight):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / inputs**0.5)
            self.lora_B["default"].weight.zero_()

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def network():
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 12, 3), (12, 12, 3), (12, 6, 3), (6, 12, 3)]
    return nn.Sequential(*(each for i, o, r in shapes for each in (Lora(i, o, r, generator), nn.Tanh())))


NET = network()


def backward(net, step):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    (net(x) - x.sin().repeat(1, 2)).square().mean().backward()


def factors(net):
    return [(m.lora_B["default"].weight, m.lora_A["default"].weight) for m in net if isinstance(m, Lora)]


def trained(net, steps=4, **options):
    optimizer = LoRAMuon(net, lr=RATE, weight_decay=DECAY, momentum=MU, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    return optimizer


def whole(net):
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for pair in factors(net) for p in pair
    ]


@pytest.mark.parametrize("scale", ["none", "original"])
def test_the_papers_formulas(scale):
    net = copy.deepcopy(NET)
    optimizer = LoRAMuon(net, lr=RATE, weight_decay=DECAY, momentum=MU, scale=scale)
    sizes = [max(1, len(B) / A.shape[1]) ** 0.5 if scale == "original" else 1.0 for B, A in factors(net)]
    oracles = [Oracle(B.detach(), A.detach(), size) for (B, A), size in zip(factors(net), sizes, strict=True)]
    first = whole(net)
    for step in range(5):
        optimizer.zero_grad()
        backward(net, step)
        for oracle, (B, A) in zip(oracles, factors(net), strict=True):
            oracle.step(B.grad, A.grad)
        optimizer.step()
        if step == 0:  # B starts at zero: only B moves, but for decay
            assert not torch.equal(whole(net)[0], first[0])
            assert torch.allclose(whole(net)[1], first[1] * (1 - RATE * DECAY) ** 0.5, rtol=0, atol=1e-15)
    for oracle, (B, A) in zip(oracles, factors(net), strict=True):
        assert torch.allclose(B, oracle.B, rtol=0, atol=1e-9)
        assert torch.allclose(A, oracle.A, rtol=0, atol=1e-9)


def test_each_factor_moves_the_product_by_half_the_rate():
    """Whatever the scales of the factors: that is what makes the rate carry over."""
    generator = torch.Generator().manual_seed(3)
    B, A, G = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((12, 3), (3, 9), (12, 9)))
    moved = []
    for c in (1.0, 100.0):
        b, a = nn.Parameter(B * c), nn.Parameter(A / c)
        optimizer = RuleOptimizer(
            [("w.lora_B.default.weight", b), ("w.lora_A.default.weight", a)],
            rule="lora_muon", lr=0.1, weight_decay=0.0, momentum=0.0, scale="none", polar="polar_express",
        )  # fmt: skip
        b.grad, a.grad = G @ (A / c).T, (B * c).T @ G
        optimizer.step()
        one = (b.detach() - B * c) @ (A / c)
        assert torch.linalg.matrix_norm(one, 2) == pytest.approx(0.05, rel=0.15)
        moved.append(b.detach() @ a.detach())
    assert torch.allclose(*moved, rtol=0, atol=1e-9)


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp2_takes_the_steps_of_one_process(world):
    net = copy.deepcopy(NET)
    trained(net)
    expected = whole(net)

    def sharded(rank):
        net = fully_shard(copy.deepcopy(NET), mesh=init_device_mesh("cpu", (world,)))
        optimizer = trained(net)
        for got, want in zip(whole(net), expected, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-9)
        assert "whole matrices at owners" in optimizer.explain()

    simulate(world, sharded)


def on_gloo(rank):
    net = fully_shard(copy.deepcopy(NET), mesh=init_device_mesh("cpu", (2,)))
    trained(net)
    return [x.tolist() for x in whole(net)]


def test_on_gloo():
    net = copy.deepcopy(NET)
    trained(net)
    (results,) = run_processes(2, [(on_gloo, ())])
    for rank in results:
        for got, want in zip(rank, whole(net), strict=True):
            assert torch.allclose(torch.tensor(got, dtype=want.dtype), want, rtol=0, atol=1e-9)


MORE = {
    name: LAYOUTS[name]
    for name in ("fsdp x8", "row-wise tp x2", "fsdp 2, row-wise tp 2", "fsdp 2 within column-wise tp 2")
}
OVER_REPLICAS = {name: LAYOUTS[name] for name in ("ddp x2", "hsdp 2x2")}
WAYS = [{}, {"state_dtype": "int8"}]
OF_REPLICAS = [*WAYS, {"shard_state": "zero1"}, {"replica_compute": "split"}]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{name}-{options}")
        for cases, ways in ((MORE, WAYS), (OVER_REPLICAS, OF_REPLICAS))
        for name, case in cases.items()
        for options in ways
    ],
)
def test_every_layout_and_bytes_as_planned(case, options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 3), (3, 10), (12, 3), (3, 10), (7, 2), (2, 9)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    gradients = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2)]
    names = [f"{i}.lora_{f}.default.weight" for i in range(3) for f in "BA"]

    def run(placed, group=None, **options):
        parameters = [nn.Parameter(placed(w)) for w in weights]
        named = list(zip(names, parameters, strict=True))
        optimizer = RuleOptimizer(named, rule="lora_muon", process_group=group, **options)
        optimizer.initialize_state()
        before = optimizer.bytes_sent
        for step in gradients:
            for p, g in zip(parameters, step, strict=True):
                p.grad = placed(g)
            optimizer.step()
        plan = optimizer.plan()
        cost = step_cost(plan, optimizer.param_groups)
        return (
            parameters,
            optimizer.bytes_sent - before,
            2 * (cost.wire + agreement_bytes(plan)) + comparison_bytes(plan),
        )

    expected, *_ = run(torch.clone, **{k: v for k, v in options.items() if k == "state_dtype"})

    def ranks(rank):
        mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=tuple("abc"[: len(case.mesh)]))
        parameters, sent, planned = run(
            lambda w: place(w, mesh, case), None if case.places else mesh.get_group(), **options
        )
        assert sent == planned
        for p, want in zip(parameters, expected, strict=True):
            assert torch.allclose(local(p), local(place(want.detach(), mesh, case)), rtol=0, atol=1e-9)

    simulate(case.world, ranks)


def test_a_rate_that_turns_the_factors_over_is_refused_before_anything_moves():
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    named = [("x.lora_A.weight", net[0].weight), ("x.lora_B.weight", net[1].weight)]
    with pytest.raises(ValueError, match="below 1"):
        RuleOptimizer(named, rule="lora_muon", lr=10.0, weight_decay=0.5)
    optimizer = RuleOptimizer(named, rule="lora_muon", lr=0.1, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [held["momentum"].clone() for held in optimizer.state.values()]
    optimizer.param_groups[0]["lr"] = 10.0
    with pytest.raises(ValueError, match="below 1"):
        optimizer.step()
    assert all(torch.equal(a, held["momentum"]) for a, held in zip(kept, optimizer.state.values(), strict=True))


def test_what_is_no_factor_goes_to_muon_and_what_has_no_partner_is_refused():
    net = nn.Sequential(copy.deepcopy(NET[0]), nn.Linear(12, 5))
    optimizer = LoRAMuon(net, lr=0.03)
    rules = {name: g["rule"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rules["0.lora_A.default.weight"] == rules["0.lora_B.default.weight"] == "lora_muon"
    assert rules["1.weight"] == "muon"
    assert {g["lr"] for g in optimizer.param_groups} == {0.03}
    assert "equilibrate" not in LoRAMuon.__init__.__annotations__
    a, b = net[0].lora_A["default"].weight, net[0].lora_B["default"].weight
    with pytest.raises(ValueError, match=r"'x.lora_A.weight' has no partner 'x.lora_B.weight'"):
        LoRAMuon([("x.lora_A.weight", a)])
    with pytest.raises(ValueError, match="'w' is named otherwise"):
        LoRAMuon([("w", a)])
    with pytest.raises(ValueError, match="has no partner"):
        LoRAMuon([{"params": [("x.lora_A.weight", a)]}, {"params": [("x.lora_B.weight", b)], "rule": "muon"}])
    both = LoRAMuon([{"params": [("x.lora_a.weight", a)], "lr": 0.1}, {"params": [("x.lora_b.weight", b)]}])
    assert [e.pair.product for e in both.plan().entries] == [(12, 6)] * 2
    with pytest.raises(ValueError, match=r"'y.lora_A.weight' has no partner"):
        both.add_param_group({"params": [("y.lora_A.weight", nn.Parameter(a.detach().clone()))]})
    assert len(both.param_groups) == 2
    new = [("y.lora_A.weight", nn.Parameter(a.detach().clone())), ("y.lora_B.weight", nn.Parameter(b.detach().clone()))]
    both.add_param_group({"params": new})
    assert all(entry.pair for entry in both.plan().entries)
    with pytest.raises(ValueError, match="row_moment"):
        LoRAMuon(net, row_moment=0.9)
    groups = param_groups(net, matrix="lora_muon", lr=0.1)
    Muon([{**g, "rule": "muon"} for g in groups if g["rule"] == "lora_muon"])


def test_checkpoints_and_a_frozen_model_that_peft_wraps():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"]))
    optimizer = LoRAMuon(model, lr=0.05)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {entry.name for entry in optimizer.plan().entries} == trainable
    assert all(entry.pair for entry in optimizer.plan().entries)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert losses[-1] < 0.8 * losses[0]
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for number in range(6, 12):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.item() == losses[number]
