"""Real architectures of `transformers`, tiny: their configurations, a batch for each, and the table of a grouping.

`python tests/grouping/zoo.py` writes the snapshots anew. Read their diff against the model's code before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf

from orthoshard.params import claims

hf.logging.set_verbosity_error()

SNAPSHOTS = Path(__file__).parent / "snapshots"
WORDS = 96
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "num_attention_heads": 4}
LAYERS = {**WIDE, "vocab_size": WORDS, "num_hidden_layers": 2, "max_position_embeddings": 64, **TOKENS}
LLAMA = {**LAYERS, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOWER = {**WIDE, "intermediate_size": 48, "num_hidden_layers": 1}

# name: (class, configuration)
ZOO = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**LLAMA, **EXPERTS, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **LLAMA,
            **EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 8}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **LLAMA,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**LAYERS, "intermediate_size": 48}),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **TOKENS},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            **TOKENS,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        },
    ),
    "bert": ("BertForMaskedLM", {**LAYERS, "intermediate_size": 48, "hidden_dropout_prob": 0.0}),
    "bert_classifier": ("BertForSequenceClassification", {**LAYERS, "intermediate_size": 48, "num_labels": 3}),
    "vit": (
        "ViTForImageClassification",
        {**WIDE, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8, "num_labels": 10},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            **TOKENS,
        },
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**TOWER, "vocab_size": WORDS, "max_position_embeddings": 16, **TOKENS},
            "vision_config": {**TOWER, "image_size": 16, "patch_size": 8},
            "projection_dim": 16,
        },
    ),
}


def build(name: str, device: str = "meta") -> torch.nn.Module:
    kind, options = ZOO[name]
    architecture = getattr(hf, kind)
    torch.manual_seed(0)
    with torch.device(device):
        return architecture(architecture.config_class(**options))


def batch(name: str) -> dict[str, torch.Tensor]:
    """Four examples, with their labels."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(3, WORDS, (4, 16), generator=draw)
    images = torch.randn(4, 3, 16, 16, generator=draw)
    if name == "bert_classifier":
        return {"input_ids": words, "labels": torch.tensor([0, 1, 2, 1])}
    if name == "vit":
        return {"pixel_values": images, "labels": torch.tensor([0, 3, 7, 9])}
    if name == "whisper":
        return {"input_features": torch.randn(4, 8, 64, generator=draw), "labels": words}
    if name == "clip":
        return {"input_ids": words, "pixel_values": images, "return_loss": torch.tensor(True)}
    return {"input_ids": words, "labels": words}


def table(model: torch.nn.Module) -> str:
    """One line a parameter."""
    trained = [c for c in claims(model) if c.parameter.requires_grad]
    rows = [(c.name, "×".join(map(str, c.parameter.shape)) or "()", c.role, c.view, c.reason) for c in trained]
    rows = [("parameter", "shape", "role", "view", "why"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) + "\n" for row in rows
    )


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for name in ZOO:
        (SNAPSHOTS / f"{name}.txt").write_text(table(build(name)))
