"""LoRA: what is trained, what a checkpoint holds, and that a resumed run is the one that went on."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from test_train_ranks import HALF, resumed, run, settings, together, worst
from train_kit import losses, tensors_sha256, tiny_config

from orthoshard.lab.train.atomic_dir import name_of
from orthoshard.lab.train.config import MachineConfig, ModelConfig, OptimizerConfig, TrainConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import LAST, train
from orthoshard.lab.train.lora import add_lora, frozen_digest
from orthoshard.lab.train.model import build_model
from orthoshard.lab.train.optimizers import build_optimizer

peft = pytest.importorskip("peft", reason="--lora is of the extra `hf`")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_config(text: Path, **changes: object) -> TrainConfig:
    return replace(tiny_config(text, **changes), model=ModelConfig("nano", 16, lora=4))


def test_adapters_are_on_every_linear_layer_but_the_head() -> None:
    model = build_model(ModelConfig("nano", 16, lora=4), 300, seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(LINEAR)
    assert {name.split(".")[-4] for name in trained} == set(LINEAR)
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    rank = {tuple(parameter.shape) for name, parameter in model.named_parameters() if name in trained}
    assert all(4 in shape for shape in rank)


def test_the_model_begins_as_it_was_and_moves_by_b_a() -> None:
    """PEFT's forward pass beside W + B A written out, with no factor between."""
    plain = build_model(ModelConfig("nano", 16), 300, seed=0)
    model = build_model(ModelConfig("nano", 16, lora=4), 300, seed=0)
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    with torch.no_grad():
        for layer, old in zip(model.model.layers, plain.model.layers, strict=True):
            adapted = layer.mlp.up_proj
            b = adapted.lora_B["default"].weight.normal_(std=0.3)
            old.mlp.up_proj.weight += b @ adapted.lora_A["default"].weight
    moved = model(input_ids=tokens).logits
    torch.testing.assert_close(moved, plain(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(moved, build_model(ModelConfig("nano", 16), 300, seed=0)(input_ids=tokens).logits)


def test_first_factors_come_from_the_seed_alone() -> None:
    def factors(seed: int) -> list[torch.Tensor]:
        model = build_model(ModelConfig("nano", 16, lora=4), 300, seed)
        return [p for name, p in model.named_parameters() if "lora_A" in name]

    torch.manual_seed(1)
    one = factors(5)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, factors(5), strict=True))
    assert not torch.equal(one[0], factors(6)[0])


@pytest.mark.parametrize("rule", ["dion", "muon"])
def test_factors_are_under_the_matrix_rule(rule: str) -> None:
    model = build_model(ModelConfig("nano", 16, lora=4), 300, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(rule))
    trained = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    assert {(group["rule"], group["role"]) for group, _ in trained} == {(rule, "lora")}
    assert len(trained) == 2 * 2 * len(LINEAR)


@pytest.mark.parametrize("optimizer", ["dion", "adamw"])
def test_only_adapters_are_trained_and_saved_and_a_resumed_run_is_the_same(
    optimizer: str, text: Path, tmp_path: Path
) -> None:
    config = lora_config(text, steps=6, optimizer=OptimizerConfig(optimizer))
    whole = train(config, tmp_path / "whole")
    before = build_model(config.model, whole.data.vocabulary, config.seed)
    assert frozen_digest(whole.model) == frozen_digest(before) is not None
    for (name, old), new in zip(before.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(old, new) != new.requires_grad, name

    checkpoint = tmp_path / "whole" / "checkpoints" / name_of(6)
    (file,) = checkpoint.glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        names = list(saved.keys())
    assert sum(name.startswith("model.") for name in names) == 2 * 2 * len(LINEAR)
    assert all("lora_" in name for name in names)

    steps = iter(range(1, 7))
    train(config, tmp_path / "part", stop=lambda: next(steps) > 2)
    again = train(config, tmp_path / "part", resume=LAST)
    assert losses(again.events) == losses(whole.events)
    assert tensors_sha256(tmp_path / "part" / "checkpoints" / name_of(6)) == tensors_sha256(checkpoint)
    # The record says how much is trained.
    head = again.events[0]
    assert head["trained"] == sum(p.numel() for p in again.model.parameters() if p.requires_grad) < head["parameters"]


def test_adapters_are_refused_on_other_weights(text: Path, tmp_path: Path) -> None:
    """The shapes fit, so only the digest of what is frozen can tell."""
    config = lora_config(text, steps=2)
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "run.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds adapters of other weights .* give the --model and --lora of that run"):
        train(replace(config, seed=1), tmp_path / "run", resume=LAST)
    with pytest.raises(UserError, match=r"holds adapters of other weights .*here of none"):
        train(replace(config, model=ModelConfig("nano", 16)), tmp_path / "run", resume=LAST)
    with pytest.raises(UserError, match=r"lora_A.* is \(4, 64\) .* and here it is \(2, 64\)"):
        train(replace(config, model=ModelConfig("nano", 16, lora=2)), tmp_path / "run", resume=LAST)
    assert (tmp_path / "run" / "run.jsonl").read_bytes() == before


def test_tied_embedding_is_frozen_and_never_saved(text: Path, tmp_path: Path) -> None:
    """A head that shares the embedding's weight has two names, and neither may come into the file."""
    file = tmp_path / "config.json"
    llama = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    file.write_text(json.dumps(llama))
    config = replace(tiny_config(text, steps=4), model=ModelConfig(str(file), 16, lora=2))
    whole = train(config, tmp_path / "whole")
    assert whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight
    folder = tmp_path / "whole" / "checkpoints"
    (saved,) = (folder / name_of(4)).glob("*.safetensors")
    assert not [name for name in load_file(saved) if "embed" in name or "lm_head" in name]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = train(config, tmp_path / "again", resume=2)
    assert losses(again.events) == losses(whole.events)


def test_replicas_and_shards_train_adapters_as_one_process_does(text: Path, tmp_path: Path) -> None:
    """Frozen and trained parameters in one `fully_shard`; and the checkpoint of shards goes on in one process."""
    lora = {
        cut: replace(settings(text, cut), model=ModelConfig("nano", 16, lora=4)) for cut in ("one", "dp 2", "fsdp 2")
    }
    expected = run(0, lora["one"], tmp_path / "one")
    cuts = ("dp 2", "fsdp 2")
    jobs = [(run, (lora[cut], tmp_path / cut)) for cut in cuts]
    jobs.append((resumed, (lora["fsdp 2"], tmp_path / "fsdp 2", tmp_path / "again")))
    *straight, again = together(2, jobs)
    for cut, figures in zip(cuts, straight, strict=True):
        assert worst(figures, expected) < 1e-3, cut
    assert again == straight[1]
    assert worst(resumed(0, lora["one"], tmp_path / "fsdp 2", tmp_path / "one again"), expected) < 1e-3
    with safe_open(next((tmp_path / "fsdp 2" / "checkpoints" / name_of(HALF)).glob("*.safetensors")), "pt") as saved:
        assert all("lora_" in name for name in saved.keys())  # noqa: SIM118 no dict


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--lora is -1; give a finite number of at least 0"):
        TrainConfig(model=ModelConfig("nano", lora=-1)).check()
    with pytest.raises(UserError, match=r"--tp 2 cannot cut the adapters of --lora; use --fsdp 4 --tp 1"):
        TrainConfig(model=ModelConfig("nano", lora=2), machine=MachineConfig(fsdp=2, tp=2)).check()
    with pytest.raises(UserError, match=r"no LoRA adapters can be put into Linear.*; leave --lora out"):
        add_lora(torch.nn.Linear(3, 3), 2, seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora needs the package peft: pip install 'orthoshard\[hf\]'"):
        build_model(ModelConfig("nano", 16, lora=2), 300, seed=0)
