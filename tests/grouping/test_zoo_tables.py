"""The groupings of real architectures: as committed, and as somebody reads them off the models' own code."""

from __future__ import annotations

import pytest
import torch
from zoo import SNAPSHOTS, ZOO, build, table

from orthoshard import Dion, param_groups
from orthoshard.params import claims
from orthoshard.views import read_view


@pytest.mark.parametrize("name", ZOO)
def test_the_table_is_as_committed(name):
    assert table(build(name)) == (SNAPSHOTS / f"{name}.txt").read_text()


def test_there_is_no_snapshot_of_nothing():
    assert {path.stem for path in SNAPSHOTS.iterdir()} == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_claimed_once(name):
    model = build(name)
    groups = param_groups(model)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len({id(parameter) for parameter in members})
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}
    assert sorted(n for group in groups for n in group["param_names"]) == sorted(n for n, _ in model.named_parameters())
    assert all(group["reason"] and group["role"] for group in groups)


# What the models' code says, by hand: (model, name): (role, view). Everything else with two dimensions or more has to
# be a whole matrix.
KNOWN = {
    ("gpt2", "transformer.wte.weight"): ("embedding", "whole"),
    ("gpt2", "transformer.wpe.weight"): ("position", "whole"),
    ("gpt2", "transformer.h.0.attn.c_attn.weight"): ("matrix", "transposed rows:32,32,32"),
    ("gpt2", "transformer.h.0.attn.c_proj.weight"): ("matrix", "transposed"),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight"): ("matrix", "transposed"),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight"): ("matrix", "transposed"),
    ("qwen3_moe", "model.layers.0.mlp.gate.weight"): ("router", "whole"),
    ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj"): ("experts", "rows:24,24"),
    ("qwen3_moe", "model.layers.0.mlp.experts.down_proj"): ("experts", "whole"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"): ("matrix", "rows:8,4"),
    ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj.weight"): ("matrix", "rows:4*(8,6)"),
    ("deepseek_v3", "model.layers.1.mlp.gate.weight"): ("router", "whole"),
    ("deepseek_v3", "model.layers.1.mlp.experts.gate_up_proj"): ("experts", "rows:24,24"),
    ("deepseek_v3", "model.layers.1.mlp.experts.down_proj"): ("experts", "whole"),
    ("qwen3_next", "model.layers.0.linear_attn.conv1d.weight"): ("convolution", "conv"),
    ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz.weight"): ("matrix", "rows:2*(8,8,16,16)"),
    ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba.weight"): ("matrix", "rows:2*(2,2)"),
    ("qwen3_next", "model.layers.3.self_attn.q_proj.weight"): ("matrix", "rows:4*(8,8)"),
    ("qwen3_next", "model.layers.0.mlp.gate.weight"): ("router", "whole"),
    ("qwen3_next", "model.layers.0.mlp.shared_expert_gate.weight"): ("router", "whole"),
    ("qwen3_next", "model.layers.0.mlp.experts.gate_up_proj"): ("experts", "rows:24,24"),
    ("qwen3_next", "model.layers.0.mlp.experts.down_proj"): ("experts", "whole"),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight"): ("matrix", "rows:32,16,16"),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight"): ("matrix", "rows:48,48"),
    ("gpt_oss", "model.layers.0.mlp.router.weight"): ("router", "whole"),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"): ("experts", "transposed rows:48*(1,1)"),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"): ("bias", "whole"),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj"): ("experts", "transposed"),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias"): ("bias", "whole"),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"): ("matrix", "rows:4*(8,8,8)"),
    ("gpt_neox", "gpt_neox.embed_in.weight"): ("embedding", "whole"),
    ("mamba", "backbone.embeddings.weight"): ("embedding", "whole"),
    ("mamba", "backbone.layers.0.mixer.A_log"): ("state space", "whole"),
    ("mamba", "backbone.layers.0.mixer.conv1d.weight"): ("convolution", "conv"),
    ("mamba", "backbone.layers.0.mixer.in_proj.weight"): ("matrix", "rows:64,64"),
    ("mamba", "backbone.layers.0.mixer.x_proj.weight"): ("matrix", "rows:2,4,4"),
    ("mamba2", "backbone.embeddings.weight"): ("embedding", "whole"),
    ("mamba2", "backbone.layers.0.mixer.conv1d.weight"): ("convolution", "conv"),
    ("mamba2", "backbone.layers.0.mixer.in_proj.weight"): ("matrix", "rows:64,64,16,16,8"),
    ("t5", "shared.weight"): ("embedding", "whole"),
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"): ("position", "whole"),
    ("t5", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"): ("position", "whole"),
    ("vit", "vit.embeddings.cls_token"): ("embedding", "whole"),
    ("vit", "vit.embeddings.position_embeddings"): ("position", "whole"),
    ("vit", "vit.embeddings.patch_embeddings.projection.weight"): ("embedding", "whole"),
    ("whisper", "model.encoder.conv1.weight"): ("embedding", "whole"),
    ("whisper", "model.encoder.conv2.weight"): ("matrix", "conv"),
    ("whisper", "model.encoder.embed_positions.weight"): ("position", "whole"),
    ("whisper", "model.decoder.embed_tokens.weight"): ("embedding", "whole"),
    ("whisper", "model.decoder.embed_positions.weight"): ("position", "whole"),
    ("clip", "text_model.embeddings.token_embedding.weight"): ("embedding", "whole"),
    ("clip", "text_model.embeddings.position_embedding.weight"): ("position", "whole"),
    ("clip", "vision_model.embeddings.position_embedding.weight"): ("position", "whole"),
    ("clip", "vision_model.embeddings.patch_embedding.weight"): ("embedding", "whole"),
    **{
        (model, f"bert.embeddings.{table}_embeddings.weight"): (role, "whole")
        for model in ("bert", "bert_classifier")
        for table, role in (("word", "embedding"), ("position", "position"), ("token_type", "embedding"))
    },
    **{(m, "classifier.weight"): ("head", "whole") for m in ("vit", "bert_classifier")},
    **{
        (model, "model.embed_tokens.weight"): ("embedding", "whole")
        for model in ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "qwen3_next", "phi3", "gemma", "gpt_oss")
    },
    **{
        (model, "lm_head.weight"): ("head", "whole")
        for model in (
            *("llama", "qwen3", "qwen3_moe", "deepseek_v3", "qwen3_next", "phi3", "gpt_oss", "gpt_neox", "mamba2"),
        )
    },
}


@pytest.mark.parametrize("name", ZOO)
def test_matrices_and_only_matrices_go_to_the_matrix_rule(name):
    found = {claim.name: claim for claim in claims(build(name))}
    layers = {claim: _first_layer(name, claim) for claim in found}
    for full, claim in found.items():
        known = KNOWN.get((name, full)) or KNOWN.get((name, layers[full]))
        if known:
            assert (claim.role, claim.view) == known, full
        elif claim.parameter.ndim < 2:
            assert claim.role in ("norm", "bias", "scalar", "state space", "embedding"), full
        else:
            assert (claim.role, claim.view) == ("matrix", "whole"), full
    assert {full for model, full in KNOWN if model == name} <= set(found)


def _first_layer(model: str, name: str) -> str:
    """The name in the first layer of its kind that has such a parameter."""
    words = [word if not word.isdecimal() else "*" for word in name.split(".")]
    for known_model, known in KNOWN:
        if known_model == model and [w if not w.isdecimal() else "*" for w in known.split(".")] == words:
            return known
    return name


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3", "whisper", "clip"])
def test_groups_of_a_meta_model_become_an_optimizer(name):
    table = Dion(build(name), lr=0.01).explain(every=True)
    for parameter, _ in build(name).named_parameters():
        assert parameter in table or parameter == "model.encoder.embed_positions.weight"  # frozen sinusoids


class TestBlocks:
    """Which rows are which matrix, asked of the models' own code: rows are numbered and followed."""

    def blocks(self, name, leaf):
        claim = next(claim for claim in claims(build(name)) if claim.name.endswith(leaf))
        reading = read_view(claim.view, tuple(claim.parameter.shape))
        length = reading.length("rows")
        return length, [
            [i for i in range(length) if block.before(i + 1) > block.before(i)] for block in reading.sides("rows")
        ]

    def rows(self, *parts):
        return [sorted(int(i) for i in part.flatten()) for part in parts]

    def test_delta_net(self):
        attention = build("qwen3_next", "cpu").model.layers[0].linear_attn
        length, found = self.blocks("qwen3_next", "layers.0.linear_attn.in_proj_qkvz.weight")
        gates, of_gates = self.blocks("qwen3_next", "layers.0.linear_attn.in_proj_ba.weight")
        q, k, v, z, b, a = attention.fix_query_key_value_ordering(
            torch.arange(float(length)).view(1, 1, -1), torch.arange(float(gates)).view(1, 1, -1)
        )
        assert found == self.rows(q, k, v, z)
        assert of_gates == self.rows(b, a)

    def test_gated_query(self):
        length, found = self.blocks("qwen3_next", "layers.3.self_attn.q_proj.weight")
        assert found == self.rows(*torch.arange(length).view(4, 16).chunk(2, dim=-1))

    def test_latent_attention(self):
        length, found = self.blocks("deepseek_v3", "layers.0.self_attn.kv_b_proj.weight")
        assert found == self.rows(*torch.arange(length).view(4, -1).split([8, 6], dim=-1))

    def test_gpt_neox(self):
        length, found = self.blocks("gpt_neox", "layers.0.attention.query_key_value.weight")
        assert found == self.rows(*torch.arange(length).view(4, -1).chunk(3, dim=-1))

    def test_gpt_oss_and_gpt2(self):
        length, found = self.blocks("gpt_oss", "layers.0.mlp.experts.gate_up_proj")
        assert found == self.rows(torch.arange(length)[::2], torch.arange(length)[1::2])
        length, found = self.blocks("gpt2", "h.0.attn.c_attn.weight")
        assert found == self.rows(*torch.arange(length).split(32))

    @pytest.mark.parametrize(("name", "owner", "leaf"), [("mamba2", "mixer", "in_proj"), ("mamba", "mixer", "x_proj")])
    def test_a_block_feeds_what_its_name_says(self, name, owner, leaf):
        """With the rows of B at zero no input reaches the state, so the output depends on C and the last ones not at
        all; with any other rows at random it does."""
        model = build(name, "cpu").eval()
        mixer = getattr(model.backbone.layers[0], owner)
        weight = getattr(mixer, leaf).weight
        _, found = self.blocks(name, f"layers.0.{owner}.{leaf}.weight")
        B, C = found[-3:-1] if name == "mamba2" else found[-2:]
        if mixer.conv1d.bias is not None:
            mixer.conv1d.bias.data.zero_()
        mixer.D.data.zero_()  # the way around the state
        if name == "mamba2":
            mixer.dt_bias.data.zero_()
        x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
        kept = weight.detach().clone()

        def output(rows):
            weight.data.copy_(kept)
            weight.data[rows] = 0
            return float(mixer(x).abs().max())

        assert output([]) > 1e-9
        assert output(B) == 0
        assert output(C) == 0
        assert output(found[0]) != output([])
