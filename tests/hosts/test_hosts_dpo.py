"""Preference tuning by TRL's DPOTrainer: adapters and every weight, from pairs that are mostly noise."""

from __future__ import annotations

import copy
import random

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from orthoshard import DionTail, LoRAMuon

WORDS = [f"w{number}" for number in range(40)]


def pairs(count):
    """A reply is preferred for its last word, a small number; the three others are noise."""
    draw = random.Random(0)

    def reply(last):
        return " " + " ".join([*draw.choices(WORDS, k=3), last])

    prompts = [" ".join(draw.choices(WORDS, k=4)) for _ in range(count)]
    good, bad = ([reply(f"w{draw.randrange(a, a + 5)}") for _ in range(count)] for a in (0, 30))
    return Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad})


MADE = {
    "DionTail without its tail": (lambda model: DionTail(model, lr=0.003, tail_weight=0.0, scale="rms"), None),
    "LoRAMuon": (
        lambda model: LoRAMuon(model, lr=0.1),
        LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_dpo_prefers_what_was_preferred(name, tmp_path):
    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *WORDS])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer._tokenizer.pre_tokenizer = Whitespace()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape))
    make, adapters = MADE[name]
    model = get_peft_model(model, adapters) if adapters else model
    settings = DPOConfig(
        output_dir=str(tmp_path), max_steps=15, per_device_train_batch_size=16, beta=0.5, logging_steps=1, bf16=False,
        gradient_checkpointing=False, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    reference = None if adapters else copy.deepcopy(model)
    optimizers = (make(model), None)
    data = pairs(64)
    trainer = DPOTrainer(
        model, reference, args=settings, train_dataset=data, processing_class=tokenizer, optimizers=optimizers
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693, abs=0.01)
    assert sum(losses[-3:]) / 3 < 0.6
