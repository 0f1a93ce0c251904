"""Building the model: a Llama by the name of its size, a pretrained one by name, or one that a Hugging Face config, a
folder or a GGUF file describes; with LoRA adapters on request.

transformers is imported late, because that takes a second, and is kept offline.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orthoshard.lab.train.config import ModelConfig
from orthoshard.lab.train.errors import UserError, first_line, unknown
from orthoshard.lab.train.lora import add_lora
from orthoshard.lab.train.pretrained import PRETRAINED, path_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Size:
    """Size of a Llama: width d, feed-forward width about 8/3 d, head dimension d / heads."""

    layers: int
    width: int
    heads: int
    tied: bool = False

    @property
    def feed_forward(self) -> int:
        return -(-8 * self.width // (3 * 32)) * 32


SIZES = {
    "nano": Size(2, 64, 2),
    "tiny": Size(4, 128, 4),
    "small": Size(4, 256, 4),
    "medium": Size(8, 512, 8),
    "llama-60m": Size(8, 512, 8, tied=True),
    "llama-130m": Size(12, 768, 12),
    "llama-350m": Size(24, 1024, 16),
    "llama-1b": Size(24, 2048, 32),
}


def build_model(config: ModelConfig, vocabulary: int, seed: int) -> nn.Module:
    """Return the model in float32 on the CPU. New weights depend on ``seed`` alone. Raises ``UserError``."""
    with offline_transformers() as hf, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        path = _path(config)
        if path is None:
            settings = llama_settings(hf, SIZES[config.name], vocabulary, config.context)
            model = hf.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        else:
            try:
                model = _from_path(hf, path)
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                raise UserError(
                    f"no model can be read from {path} ({first_line(error)}); give a Hugging Face config.json of a "
                    "causal language model, a folder with config.json and *.safetensors, or a .gguf file."
                ) from error
    has = int(model.config.get_text_config().vocab_size)
    if has < vocabulary:
        raise UserError(
            f"the tokens go up to {vocabulary} and the model {config.name} has a vocabulary of {has}; give "
            f"--vocabulary {has} or less, or the model's own tokenizer with --tokenizer."
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and config.context > limit:
        raise UserError(f"the model {config.name} reads at most {limit} tokens; give --context {limit} or less.")
    if config.lora:
        add_lora(model, config.lora, seed)
    return model


def own_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """Return the tokenizer that comes with weights to fine-tune, or None for a model that is trained from scratch."""
    path = _path(config)
    if path is None or path.suffix == ".json":
        return None
    if path.is_dir() and (path / "tokenizer.json").is_file():
        from orthoshard.lab.train.tokenizer import load_tokenizer

        return load_tokenizer(path / "tokenizer.json")
    with offline_transformers() as hf:
        try:
            if path.is_dir():
                fast = hf.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            else:
                fast = hf.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(
                f"no tokenizer can be read from {path} ({first_line(error)}); put the model's "
                "tokenizer.json beside its weights, or give its path with --tokenizer."
            ) from error
    return fast.backend_tokenizer


def _path(config: ModelConfig) -> Path | None:
    """Return the file or folder of the model, or None if the name is that of a size. Raises ``UserError``."""
    if config.name in SIZES:
        return None
    path = path_of(config.name) if config.name in PRETRAINED else Path(config.name).expanduser()
    if path.suffix == ".gguf" and find_spec("gguf") is None:
        raise UserError(f"reading {path} needs the package gguf: pip install 'orthoshard[hf]'.")
    if path.is_dir() or (path.is_file() and path.suffix in (".json", ".gguf")):
        return path
    if path.is_file():
        raise UserError(f"{path} is not a model; give a config.json, a folder with safetensors, or a .gguf file.")
    if path.suffix in (".json", ".gguf") or os.sep in config.name:
        raise UserError(f"there is no model at {path}; check the path.")
    raise unknown(
        "model", config.name, [*SIZES, *PRETRAINED], also="a config.json, a folder with safetensors, a .gguf file"
    )


def llama_settings(hf: Any, size: Size, vocabulary: int, context: int) -> Any:
    """Return ``size`` as a configuration of ``hf``, the transformers package."""
    return hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(context, 32),
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def _from_path(hf: Any, path: Path) -> Any:
    if path.suffix == ".json":
        settings = hf.AutoConfig.from_pretrained(str(path), local_files_only=True)
        return hf.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    if path.suffix == ".gguf":
        with redirect_stderr(StringIO()):  # no setting turns its progress bar off
            return hf.AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
    return hf.AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


@contextmanager
def offline_transformers() -> Generator[Any]:
    """Yield the transformers package, offline and quiet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
