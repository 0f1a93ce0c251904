"""`orthoshard explain`: tables of published models on meshes that nobody has, and its refusals."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from orthoshard import Dion, DionTail, Muon, RuleOptimizer
from orthoshard.lab.explain.cli import main
from orthoshard.lab.explain.mesh import described_mesh, place, read_mesh
from orthoshard.lab.models import describe, known
from orthoshard.lab.train.config import OptimizerConfig
from orthoshard.lab.train.optimizers import build_optimizer

GIB = 2**30


def shown(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_llama_405b_in_half_a_minute_and_two_gib():
    """Of its own: limits on processor time and on data, which the kernel holds."""

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        resource.setrlimit(resource.RLIMIT_DATA, (2 * GIB, 2 * GIB))

    script = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('orthoshard', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    flags = ["explain", "--model", "llama3-405b", "--mesh", "dp=16,fsdp=64,tp=8", "--rank-fraction", "1/16"]
    command = [sys.executable, "-c", script, "orthoshard", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, preexec_fn=limit)
    assert run.returncode == 0, run.stderr
    *lines, kibibytes = run.stdout.splitlines()
    assert int(kibibytes) < 2 * GIB / 1024
    assert lines[0].startswith("llama3-405b: 405,853,388,800 parameters")
    (gate,) = [line for line in lines if "mlp.gate_proj" in line]
    assert gate.split()[:5] == ["model.layers.{0..125}.mlp.gate_proj.weight", "53248×16384", "matrix", "dion", "r=1024"]
    assert len(lines) < 30  # a model of 1137 parameters fits a screen
    assert "rows / tp=8 / fsdp=64, replicas dp=16" in gate
    (down,) = [line for line in lines if "mlp.down_proj" in line]
    assert "rows / fsdp=64, columns / tp=8" in down
    # float32 momentum cut 512 ways; Q spans the rows: cut 512 ways too in column-wise weights, 64 in row-wise ones;
    # two moments of AdamW for tables (512 ways) and norms (64 ways), and their step counters
    width, hidden, kv, layers, words = 16384, 53248, 1024, 126, 128256
    matrices = layers * (2 * width**2 + 2 * kv * width + 3 * hidden * width)
    q = layers * ((width * 1024 + 2 * kv * 64 + 2 * hidden * 1024) // 512 + 2 * width * 1024 // 64)
    adamw = 2 * (2 * words * width // 512 + (2 * layers + 1) * width // 64) + 2 + 2 * layers + 1
    state = 4 * (matrices // 512 + q + adamw)
    assert f"state {state / 1e9:.3g} GB." in lines[-1]


# Quick ones of each kind: `tests/grouping` has every architecture, small.
FIRST = {"nano", "gpt2", "llama3-8b", "mixtral-8x7b", "gpt-oss-20b", "mamba2-2.7b", "t5-base", "clip-vit-b32"}
SIZES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in known() if "405b" not in name]


@pytest.mark.parametrize("name", SIZES)
def test_every_model_of_the_catalogue_is_as_large_as_published(name, capsys):
    published = describe(name).parameters
    out = shown(capsys, "--model", name, "--mesh", "dp=2,fsdp=4", "--optimizer", "muon")
    count = int(re.search(r": ([\d,]+) parameters", out)[1].replace(",", ""))
    assert published is None or count == pytest.approx(published, rel=0.005)
    assert "A step on each of 8 ranks" in out
    assert "taken as one" not in out  # every fused layer of a published model is known
    assert "unknown name" not in out


def test_one_line_for_all_layers_or_one_for_each(capsys):
    short, long = shown(capsys, "--model", "nano"), shown(capsys, "--model", "nano", "--all")
    assert short.count("q_proj") == 1
    assert "model.layers.{0..1}.self_attn.q_proj.weight" in short
    assert "model.layers.0.self_attn.q_proj.weight" in long
    assert "model.layers.1.self_attn.q_proj.weight" in long
    assert short.splitlines()[-1] == long.splitlines()[-1]


def test_options_of_the_optimizer(capsys):
    out = shown(capsys, "--model", "nano", "--lr", "0.5", "--scalar", "lion", "--rank-fraction=1/8", "--buckets")
    (line,) = [line for line in out.splitlines() if "q_proj" in line]
    assert "dion r=8" in line
    assert " 0.5 " in line
    assert "lion" in out
    assert "under dion: nothing travels" in out


def test_experts_over_expert_and_data_parallel_ranks(capsys):
    out = shown(capsys, "--model", "mixtral-8x7b", "--mesh", "tp=2,fsdp=4,ep=8,dp=3")
    (line,) = [line for line in out.splitlines() if "experts.gate_up_proj" in line]
    assert "batch / ep=8, rows / tp=2 / fsdp=4, replicas dp=3" in line
    (line,) = [line for line in out.splitlines() if "o_proj" in line]
    assert "rows / fsdp=4 / ep=8, columns / tp=2, replicas dp=3" in line


def test_a_configuration_file(tmp_path, capsys):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 24, "n_head": 2, "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    assert "transposed rows:24,24,24" in shown(capsys, "--model", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 24, "n_head": 2, "n_layer": 1}))
    assert "24×72" in shown(capsys, "--model", str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "lama3-8b"), "did you mean 'llama3-8b'"),
        (("--model", "./nowhere/config.json"), "there is no configuration at"),
        (("--mesh", "fdsp=2"), "did you mean 'fsdp'"),
        (("--mesh", "foo=2"), "a mesh has no axis 'foo'; they are"),
        (("--mesh", "fsdp"), "needs a number of ranks, such as fsdp=8"),
        (("--mesh", "fsdp=2,fsdp=4"), "twice"),
        (("--mesh", "fsdp=4096,tp=4096"), "more than"),
        (("--model", "gpt2", "--mesh", "tp=2"), "leave tp out of the mesh"),
        (("--mesh", "ep=2"), "has no experts; leave ep out of the mesh"),
        (("--model", "nano", "--mesh", "tp=3"), "tp=3 does not divide the 2 attention heads of nano; choose a divisor"),
        (("--model", "mixtral-8x7b", "--mesh", "ep=3"), "ep=3 does not divide the 8 experts"),
        (("--optimizer", "doin"), "did you mean 'dion'"),
        (("--optimizer", "muon", "--rank-fraction", "1/4"), "means nothing to the optimizer muon"),
    ],
)
def test_refusals(arguments, sentence, capsys):
    assert re.search(sentence, refused(capsys, *arguments))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["dion", "dion_tail", "muon", "adamw"])
def test_rates_are_those_of_the_library(name):
    """Those of `orthoshard train` as well, which builds its optimizer in the same way."""
    model = describe("nano").on_meta()
    theirs = {
        "adamw": lambda model: RuleOptimizer(model, rule="adamw"),
        "dion": Dion,
        "dion_tail": DionTail,
        "muon": Muon,
    }
    rates = [
        {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
        for optimizer in (theirs[name](model), build_optimizer(model, OptimizerConfig(name=name)))
    ]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads"),
        ({"hidden_act": "sillu"}, "sillu"),
    ],
)
def test_a_configuration_that_does_not_fit_together(wrong, reason, tmp_path, capsys):
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **size, **wrong}))
    sentence = refused(capsys, "--model", str(tmp_path))
    assert re.search(rf"transformers cannot build .*config.json \(.*{reason}.*\); correct its configuration", sentence)


def test_no_model_type(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert "describes no model that transformers has" in refused(capsys, "--model", str(tmp_path))


class Plan(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, x):
        return self.down(self.up(x))


def test_placed_as_torch_itself_places():
    """fully_shard inside of parallelize_module on the CPU: the same placements, the same local shapes."""
    sizes = read_mesh("fsdp=4,tp=2")
    with described_mesh(sizes) as mesh:
        described, real = Plan().to("meta"), Plan()
        described.tp_plan = {"up": "colwise", "down": "rowwise"}
        place(described, mesh, set())
        tp = init_device_mesh("cpu", (4, 2), mesh_dim_names=("fsdp", "tp"))
        parallelize_module(real, tp["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(real, mesh=tp["fsdp"])
        for (name, ours), (_, theirs) in zip(described.named_parameters(), real.named_parameters(), strict=True):
            assert ours.placements == theirs.placements, name
            assert ours.to_local().shape == theirs.to_local().shape, name
