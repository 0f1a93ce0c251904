"""The calculator's formulas against the library's own count, and the arithmetic of a row by hand."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from torch import nn

from orthoshard import RuleOptimizer
from orthoshard.layout import Axis, deal, passed_on
from orthoshard.planner.contestants import contestants
from orthoshard.planner.count import counted
from orthoshard.planner.estimate import DAY, Amounts, Job, Machine, cost, days, links, times
from orthoshard.planner.even import PASSES, STEPS, Kind, Model, Row, amounts, touches
from orthoshard.planner.muon278 import STORIES, newton_schulz
from orthoshard.planner.subject import calculator_inputs, subject
from orthoshard.rules import RULES

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MOE = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
CONV1D = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 4, "n_layer": 16}
MESHES = {
    "llama": (LLAMA, {"dp": 2, "fsdp": 4, "tp": 2}),
    "llama, no replicas": (LLAMA, {"fsdp": 8, "tp": 2}),
    "experts": (MOE | {"num_experts_per_tok": 2}, {"dp": 2, "fsdp": 2, "tp": 4}),
    "stored transposed": (CONV1D | {"vocab_size": 512, "n_positions": 64}, {"dp": 2, "fsdp": 4}),
}
RANKS = [1.0, 0.25, 0.0625]


def model_of(inputs):
    kinds = tuple(Kind(**kind) for kind in inputs["model"]["kinds"])
    return Model(kinds, tuple(inputs["model"]["scalars"]), inputs["model"]["tensors"], inputs["model"]["parameters"])


@pytest.mark.parametrize(("config", "mesh"), MESHES.values(), ids=MESHES)
def test_the_calculator_equals_the_count(config, mesh, tmp_path):
    """To ten digits, on the mean over ranks, for every row that the library can run."""
    path = str(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    chosen, model = subject(path), model_of(calculator_inputs(path))
    full = {axis: mesh.get(axis, 1) for axis in ("dp", "fsdp", "tp")}
    rows = [row for row in contestants(full["dp"], RANKS, formulas=False) if row.options is not None]
    assert len(rows) > 6
    for row in rows:
        with chosen.placed(mesh, own_gradients=row.own_gradients) as placed:
            plan, groups = placed.plan(row.row.rule, **row.options)
            real = counted(plan, groups, full["dp"]).mean
        even = amounts(model, full, row.row)
        assert real.products == even.products
        for field in ("flops", "touched", "passes", "state"):
            assert getattr(real, field) == pytest.approx(getattr(even, field), rel=1e-10), (row.name, field)
        # the blocks of a parameter are one bucket, and owners of a bucket get different numbers of its parameters
        near = {"rel": 1e-10} if config == LLAMA and row.row.replicas != "own" else {"rel": 0.6}
        assert real.temporaries == pytest.approx(even.temporaries, **near), row.name
        for field in ("sent", "synced"):
            assert getattr(real, field) == pytest.approx(getattr(even, field), rel=1e-10), (row.name, field)


def test_accesses_are_those_of_the_rules():
    for name, rule in RULES.items():
        if name in PASSES:
            for shape in ((8, 8), (8, 12), (13, 8)):
                assert PASSES[name] + touches(name, *shape) == rule().demand(shape, torch.float32).accesses, name


def test_state_of_one_process_is_what_an_optimizer_holds():
    weights = [nn.Parameter(torch.zeros(24, 16)) for _ in range(3)]
    for rule, rank in (("muon", 1.0), ("dion", 0.25), ("dion_tail", 0.25), ("adamw", 1.0)):
        options = {"rank_fraction": rank} if rank < 1 else {}
        optimizer = RuleOptimizer(weights, rule=rule, **options)
        optimizer.initialize_state()
        held = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
        model = Model((Kind(24, 16, 3),), (0.0, 0.0), 0, 3)
        assert amounts(model, {"dp": 1, "fsdp": 1, "tp": 1}, Row(rule, rank)).state == held


def test_formulas_by_hand():
    """One (m, n) = (512, 256) matrix, cut by rows over 4 ranks, on two replicas."""
    model, mesh = Model((Kind(512, 256, 1),), (0.0, 0.0), 0, 1), {"dp": 2, "fsdp": 4, "tp": 1}
    polar = STEPS * (4 * 512 * 256**2 + 2 * 256**3)
    agreement = 2 * 8 * 5
    redundant = amounts(model, mesh, Row("muon", replicas="repeat", form="redundant"))
    assert redundant.flops == polar
    assert redundant.sent["fsdp"] == 4 * 512 * 256 * 3 / 4 + agreement * 3 / 4
    gram = amounts(model, mesh, Row("muon", replicas="repeat", form="gram"))
    assert gram.flops == max(2 * 4 * 512 * 256**2 / 4 + 40 * 256**3 / 4, 40 * 256**3)
    assert gram.sent["fsdp"] == 2 * 2 * 3 / 4 * 256**2 * 2 + agreement * 3 / 4
    owners = amounts(model, mesh, Row("muon", replicas="split"))
    in_two_rounds = 2 * 4 * 512 * 256**2 + (8 * STEPS - 6 * 2) * 256**3
    assert owners.flops == in_two_rounds, "one matrix is one rank's, however many share"
    assert owners.synced == {"dp": 2 * 1 / 2 * 4 * 512 * 256 / 4}


def test_a_step_by_hand():
    machine = Machine(polar=1e12, factors=5e11, memory=1e10, intra=1e9, inter=1e8, per_node=2, peak=2e12, capacity=1e9)
    job = Job(active=1e9, ranks=8, tokens_per_step=1e3, tokens=1e9, utilization=0.5, price=2.0)
    spent = times(
        Amounts("factors", 1e10, 1e9, 2e9, {"tp": 1e9, "dp": 1e8}, {"dp": 5e7}, 0.0, 0.0),
        [("dp", 4), ("tp", 2)],
        machine,
        job,
    )
    assert spent.products == 0.1  # memory takes longer than 1e10 / 5e11
    assert spent.passes == 0.2
    assert (spent.intra, spent.inter, spent.sync) == (1.0, 1.0, 0.5)
    assert spent.model == 6e12 / (8 * 1e12)
    assert spent.overhead == pytest.approx(2.8 / 0.75)
    assert days(spent.step, job) == pytest.approx(1e6 * 3.55 / DAY)
    assert cost(10.0, job) == 10 * 24 * 8 * 2


def test_the_innermost_axes_fill_a_node():
    mesh = [("dp", 2), ("fsdp", 8), ("tp", 4)]
    assert links(mesh, 4) == {"dp": "inter", "fsdp": "inter", "tp": "intra"}
    assert links(mesh, 32) == {"dp": "inter", "fsdp": "intra", "tp": "intra"}
    assert links(mesh, 16)["fsdp"] == "inter", "an axis that does not fit counts as between nodes"


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_no_rank_gets_every_remainder(batch):
    """Batches of a few matrices, dealt out along three axes one after the other: even in the end."""
    sizes, rounds = (2, 4, 2), 48
    owned = []
    for coordinates in product(*map(range, sizes)):
        axes = [Axis((i,), "abc"[i], size, at) for i, (size, at) in enumerate(zip(sizes, coordinates, strict=True))]
        total = 0
        for number in range(rounds):
            own, first = batch, number * batch
            for axis in axes:
                own, first = deal(own, axis.size, first)[axis.coordinate], passed_on(first, axis)
            total += own
        owned.append(total)
    assert owned == [rounds * batch // 16] * 16


def test_278_days():
    """Llama-3-405B in 16 pipeline stages at 400 TFLOP/s, every rank its stage; flops from the model itself."""
    inputs = calculator_inputs("llama3-405b")
    per_step = sum(
        kind["count"] * STEPS * (4 * max(kind["m"], kind["n"]) * min(kind["m"], kind["n"]) ** 2)
        + kind["count"] * STEPS * 2 * min(kind["m"], kind["n"]) ** 3
        for kind in inputs["model"]["kinds"]
    )
    assert newton_schulz() == pytest.approx(per_step, rel=1e-12)
    (said,) = [story for story in STORIES if abs(story.days - 278) < 1]
    assert said.days == pytest.approx(15.6e12 / 16e6 * per_step / 16 / 400e12 / 86400)


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("mixtral-8x22b", 39), ("llama3-8b", 8.03)]
)
def test_active_parameters_are_the_published_ones(name, billions):
    assert subject(name).active / 1e9 == pytest.approx(billions, rel=0.03)
    assert math.isfinite(subject(name).active)
