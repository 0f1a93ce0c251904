"""Models: sizes by name, first weights from the seed alone, and what a file or folder describes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_kit import losses, tiny_config

from orthoshard.lab.train.config import ModelConfig
from orthoshard.lab.train.data import prepare
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import LAST, train
from orthoshard.lab.train.model import SIZES, build_model, own_tokenizer
from orthoshard.lab.train.tokenizer import train_bpe

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size.width <= 256])
def test_sizes_have_the_parameters_their_formula_says(name: str) -> None:
    size = SIZES[name]
    model = build_model(ModelConfig(name, 128), vocabulary=1024, seed=0)
    d, f = size.width, size.feed_forward
    layer = 4 * d * d + 3 * d * f + 2 * d
    assert sum(p.numel() for p in model.parameters()) == size.layers * layer + 2 * 1024 * d + d
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_first_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build_model(ModelConfig("nano", 32), 300, seed=5).state_dict()
    before = torch.get_rng_state()
    two = build_model(ModelConfig("nano", 32), 300, seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = build_model(ModelConfig("nano", 32), 300, seed=6).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_config_file(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    config = replace(tiny_config(text, steps=3), model=ModelConfig(str(file), 16))
    result = train(config, tmp_path / "run")
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}  # whatever the file says
    assert result.model.get_input_embeddings().num_embeddings == 320


def test_gpt2_config_with_dropout_and_tied_weights_resumes_to_the_bit(text: Path, tmp_path: Path) -> None:
    """Dropout draws from the global generator, which the loop seeds by the step's number; GPT-2 ties its embedding."""
    file = tmp_path / "config.json"
    gpt2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    file.write_text(json.dumps(gpt2 | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}))
    config = replace(tiny_config(text, steps=6), model=ModelConfig(str(file), 16))
    whole = train(config, tmp_path / "whole")
    steps = iter(range(1, 7))
    train(config, tmp_path / "part", stop=lambda: next(steps) > 3)
    again = train(config, tmp_path / "part", resume=LAST)
    assert losses(again.events) == losses(whole.events)
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


def pretrained(folder: Path, **save: object) -> torch.nn.Module:
    """A folder as Hugging Face's save_pretrained leaves it, with a tokenizer of its own."""
    import transformers

    torch.manual_seed(3)
    settings = transformers.AutoConfig.for_model(**LLAMA)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(folder, **save)
    train_bpe(["some text of another kind, " * 30], 280).save(str(folder / "tokenizer.json"))
    return model


def test_folder_with_safetensors_is_finetuned_with_its_tokenizer(text: Path, tmp_path: Path) -> None:
    model = pretrained(tmp_path / "hf")
    settings = ModelConfig(str(tmp_path / "hf"), 16)
    loaded = build_model(settings, 280, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    tokenizer = own_tokenizer(settings)
    assert tokenizer is not None
    config = replace(tiny_config(text, steps=4), model=settings)
    result = train(config, tmp_path / "run")
    assert result.data.tokenizer is not None
    assert result.data.tokenizer.to_str() == tokenizer.to_str()
    assert result.data.digest == prepare(config.data, tokenizer).digest != prepare(config.data).digest
    again = train(replace(config, schedule=replace(config.schedule, steps=5)), tmp_path / "run", resume=LAST)
    assert again.step == 5


def test_gguf_is_finetuned_with_its_tokenizer(text: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, file)
    settings = ModelConfig(str(file), 16)
    tokenizer = own_tokenizer(settings)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("bad cab, café", add_special_tokens=False).ids) == "bad cab, café"
    result = train(replace(tiny_config(text, steps=3), model=settings), tmp_path / "run")
    assert result.step == 3
    head = build_model(settings, tokenizer.get_vocab_size(), seed=0).get_output_embeddings()
    assert torch.equal(head.weight[:, 0], torch.arange(len(head.weight)) / 1000)


def write_gguf(gguf: object, file: Path) -> None:
    """One layer of width 32 with random weights, the head's first column marked, and a byte-level tokenizer."""
    import tokenizers

    trained = json.loads(train_bpe(["a bad cab " * 50], 270).to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    assert tokenizers.__version__
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in trained["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    head = (rng.standard_normal((len(tokens), 32)) * 0.02).astype(np.float32)
    head[:, 0] = np.arange(len(tokens), dtype=np.float32) / 1000
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", (rng.standard_normal(shape) * 0.02).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.add_tensor("token_embd.weight", (rng.standard_normal((len(tokens), 32)) * 0.02).astype(np.float32))
    writer.add_tensor("output.weight", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("context", "vocabulary", "sentence"),
    [
        (16, 400, r"tokens go up to 400 and the model .* has a vocabulary of 320; give --vocab"),
        (65, 300, "reads at most 64 tokens; give --context 64"),
    ],
)
def test_what_does_not_fit(context: int, vocabulary: int, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UserError, match=sentence):
        build_model(ModelConfig(str(tmp_path / "config.json"), context), vocabulary, seed=0)


def bad_models(folder: Path) -> dict[str, tuple[str, str]]:
    (folder / "empty").mkdir()
    (folder / "not.json").write_text("{")
    (folder / "unknown.json").write_text('{"model_type": "abacus"}')
    (folder / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "notes.txt").write_text("a model?")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text(json.dumps(LLAMA))
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    return {
        "empty": (str(folder / "empty"), "can be read from"),
        "not json": (str(folder / "not.json"), "no model can be read"),
        "unknown": (str(folder / "unknown.json"), "no model can be read"),
        "gguf": (str(folder / "bad.gguf"), "can be read from"),
        "text": (str(folder / "notes.txt"), "is not a model"),
        "pickled": (str(folder / "pickled"), "no tokenizer can be read"),
        "missing": (str(folder / "nowhere.gguf"), "there is no model at"),
        "hub": ("org/model", "there is no model at org/model"),
    }


@pytest.mark.parametrize("case", ["empty", "not json", "unknown", "gguf", "text", "pickled", "missing", "hub"])
def test_what_is_no_model(case: str, text: Path, tmp_path: Path) -> None:
    name, sentence = bad_models(tmp_path)[case]
    with pytest.raises(UserError, match=sentence) as caught:
        train(replace(tiny_config(text), model=ModelConfig(name, 16)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    from orthoshard.lab.train.tokens import write_tokens

    write_tokens(tmp_path / "a.bin", np.arange(5000, dtype=np.uint32) % 400)
    config = tiny_config(tmp_path / "unused.txt")
    config = replace(config, data=replace(config.data, corpus=f"bin:{tmp_path}/a.bin"))
    with pytest.raises(UserError, match=r"holds the token \d+, and the vocabulary is 300; give --vocabulary"):
        train(config, tmp_path / "run")
