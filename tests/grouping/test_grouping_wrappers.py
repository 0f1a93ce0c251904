"""The same grouping on meta, compiled, checkpointed, data-parallel, sharded and adapted models."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from zoo import batch, build

from orthoshard import Dion, param_groups
from orthoshard.params import claims


@pytest.fixture
def world():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    dist.destroy_process_group()


def facts(model):
    trained = [claim for claim in claims(model) if claim.parameter.requires_grad]
    return [(claim.name, tuple(claim.parameter.shape), claim.role, claim.view, claim.reason) for claim in trained]


def checkpointed(model):
    layers = {id(layer) for layer in model.model.layers}
    apply_activation_checkpointing(model, check_fn=lambda module: id(module) in layers)
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "checkpointed": checkpointed,
    "compiled and checkpointed": lambda model: torch.compile(checkpointed(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data-parallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_hides_types_is_said():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    with pytest.warns(UserWarning, match="TorchScript hides the types"):
        Dion(torch.jit.script(model))
    with pytest.raises(TypeError, match="takes a model, not generator"):
        param_groups(model.parameters())


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_nothing(wrap):
    plain, wrapped = build("qwen3_next"), wrap(build("qwen3_next"))
    assert facts(wrapped) == facts(plain)


def test_inner_modules_compiled_in_place():
    model = build("phi3")
    plain = facts(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer)
    assert facts(model) == plain


@pytest.mark.parametrize("name", ["gpt2", "qwen3_next", "deepseek_v3", "whisper"])
def test_after_sharding_as_before(name, world):
    plain = facts(build(name))
    model = build(name, "cpu")
    fully_shard(model, mesh=world)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert facts(model) == plain
    assert Dion(model).plan().entries


def test_under_ddp(world):
    model = build("gpt2", "cpu")
    plain = facts(model)
    assert facts(nn.parallel.DistributedDataParallel(model)) == plain


def test_a_layer_that_is_sharded_by_itself(world):
    """fully_shard gives a module another class."""
    model = build("gpt2", "cpu")
    plain = facts(model)
    for block in model.transformer.h:
        fully_shard(block.attn.c_attn, mesh=world)
    assert facts(model) == plain


def test_a_module_named_module_keeps_its_name():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)

    assert [name for name, *_ in facts(Holder())] == ["module.weight", "module.bias"]


class TestPeft:
    def adapted(self, name, **options):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, lora_alpha=8, **options)
        return peft.get_peft_model(build(name, "cpu"), config)

    def test_factors_are_matrices_of_their_own_role(self):
        model = self.adapted("llama", target_modules=["q_proj", "v_proj"])
        found = facts(model)
        assert {role for _, _, role, _, _ in found} == {"lora"}
        assert len(found) == 2 * 2 * 2
        assert all(".lora_A." in name or ".lora_B." in name for name, *_ in found)

    def test_saved_modules_dora_and_embedding_factors(self):
        model = self.adapted(
            "llama", target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True
        )
        roles = {name: role for name, _, role, _, _ in facts(model)}
        assert roles.pop("base_model.model.lm_head.modules_to_save.default.weight") == "head"
        assert {n: r for n, r in roles.items() if "embedding_A" in n} == {
            "base_model.model.model.embed_tokens.lora_embedding_A.default": "embedding"
        }
        assert {r for n, r in roles.items() if "embedding_B" in n} == {"lora"}
        assert {r for n, r in roles.items() if "magnitude" in n} == {"scalar"}
        assert {r for n, r in roles.items() if "lora_A" in n or "lora_B" in n} == {"lora"}

    def test_fused_layers_are_known_inside_of_adapters(self):
        model = self.adapted("phi3", target_modules=["qkv_proj"])
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        views = {name: view for name, _, _, view, _ in facts(model)}
        assert views["base_model.model.model.layers.0.self_attn.qkv_proj.base_layer.weight"] == "rows:32,16,16"
        assert views["base_model.model.model.layers.0.mlp.gate_up_proj.weight"] == "rows:48,48"

    def test_factors_train(self):
        model = self.adapted("llama", target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        frozen = copy.deepcopy({n: p.detach() for n, p in model.named_parameters() if not p.requires_grad})
        optimizer = Dion(model, lr=0.05, rank_fraction=1.0)
        losses = []
        for _ in range(20):
            loss = model(**batch("llama")).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.1
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(16, 48, bias=False)
        self.kv = nn.MultiheadAttention(16, 2)
        self.lstm = nn.GRU(16, 16)
        self.in_proj = nn.Linear(16, 40, bias=False)


def test_torch_modules_and_hand_written_models():
    found = {name: (role, view, reason) for name, _, role, view, reason in facts(Attention())}
    assert found["c_attn.weight"][:2] == ("matrix", "rows:16,16,16")
    assert found["kv.in_proj_weight"][:2] == ("matrix", "rows:16,16,16")
    assert found["lstm.weight_ih_l0"][:2] == ("matrix", "rows:16,16,16")
    role, view, reason = found["in_proj.weight"]
    assert (role, view) == ("matrix", "whole")
    assert "does not say which" in reason
    assert all(group["reason"] for group in param_groups(Attention()))


class MoeGatedDeltaNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(8, 8, bias=False)


class Block(nn.Module):
    """What was once taken for something else: in Qwen3.5-MoE, JetMoe, XLNet, SwiftFormer, SigLIP, Reformer."""

    def __init__(self):
        super().__init__()
        self.linear_attn = MoeGatedDeltaNet()
        self.input_linear = nn.Linear(8, 12, bias=False)
        self.q = nn.Parameter(torch.zeros(32, 4, 8))
        self.layer_scale = nn.Parameter(torch.zeros(8, 1, 1))
        self.probe = nn.Parameter(torch.zeros(1, 1, 8))
        self.position_embeddings = nn.ParameterList([nn.Parameter(torch.zeros(4, 6, 8))])
        self.expert_bias = nn.Parameter(torch.zeros(4, 8))
        self.gates = nn.Parameter(torch.zeros(3, 8, 8))


def test_what_was_once_mistaken():
    found = {name: (role, view) for name, _, role, view, _ in facts(Block())}
    assert found["linear_attn.out_proj.weight"] == ("matrix", "whole")
    assert found["input_linear.weight"] == ("matrix", "whole")
    assert found["q"] == ("other", "whole")
    assert found["layer_scale"] == ("scalar", "whole")
    assert found["probe"] == ("embedding", "whole")
    assert found["position_embeddings.0"] == ("position", "whole")
    assert found["expert_bias"] == ("bias", "whole")
    assert found["gates"] == ("experts", "whole")


class Experts(nn.Module):
    """Gate and up of each expert as matrices of their own."""

    def __init__(self, hidden, **shapes):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=hidden)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shapes", "views"),
    [
        ({"w13": (4, 2, 16, 8), "w2": (4, 8, 16)}, {"w13": "stack", "w2": "whole"}),
        ({"w13": (4, 2, 8, 16), "w2": (4, 16, 8)}, {"w13": "stack transposed", "w2": "transposed"}),
        ({"gate_up_proj": (3, 4, 32, 8), "down_proj": (3, 4, 8, 16)}, {"gate_up_proj": "stack rows:16,16"}),
        ({"gate_up_proj": (3, 4, 8, 32), "down_proj": (3, 4, 16, 8)}, {"gate_up_proj": "stack transposed rows:16,16"}),
        ({"w": (2, 2, 2, 16, 8)}, {"w": "stack"}),
    ],
)
def test_stacks_of_stacks_of_experts(shapes, views):
    model = nn.ModuleDict({"experts": Experts(8, **shapes)})
    found = {name.removeprefix("experts."): (role, view) for name, _, role, view, _ in facts(model)}
    assert {role for role, _ in found.values()} == {"experts"}
    assert {name: found[name][1] for name in views} == views
    optimizer = Dion(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(parameter.abs().min() > 0 for parameter in model.parameters())


class Fused(nn.Module):
    """An attention of two heads of 8 and one key-value head where the model has groups."""

    def __init__(self, leaf, rows, **config):
        super().__init__()
        self.config = types.SimpleNamespace(num_attention_heads=2, hidden_size=16, **config)
        self.add_module(leaf, nn.Linear(16, rows, bias=False))


@pytest.mark.parametrize(
    ("leaf", "rows", "config", "view"),
    [
        ("qkv_proj", 48, {"model_type": "minimax"}, "rows:2*(8,8,8)"),
        ("qkv_proj", 32, {"model_type": "phi3", "num_key_value_heads": 1}, "rows:16,8,8"),
        ("qkv_proj", 48, {"model_type": "codegen"}, "rows:4*(4,4,4)"),
        ("in_proj", 48, {"model_type": "deberta"}, "rows:2*(8,8,8)"),
        ("query_key_value", 48, {"model_type": "bloom"}, "rows:2*(8,8,8)"),
        ("query_key_value", 32, {"model_type": "falcon", "multi_query": True}, "rows:16,8,8"),
        (
            "query_key_value",
            48,
            {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True},
            "rows:2*(8,8,8)",
        ),
        ("query_key_value", 48, {"model_type": "nobody_knows"}, "whole"),
        ("c_attn", 32, {"model_type": "gpt_bigcode", "multi_query": True}, "rows:16,8,8"),
        ("q_proj", 32, {"model_type": "qwen3_5_text", "head_dim": 8}, "rows:2*(8,8)"),
        ("q_proj", 32, {"model_type": "mistral_large4", "head_dim": 8}, "whole"),
    ],
)
def test_conventions_of_fused_attention(leaf, rows, config, view):
    """As the `transformers` code of each model splits the rows."""
    ((_, _, role, found, _),) = facts(Fused(leaf, rows, **config))
    assert (role, found) == ("matrix", view)
