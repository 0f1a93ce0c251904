"""A model by name or path, as a configuration and as modules on the meta device.

    name   a size of `orthoshard train`, an entry of `catalogue.toml`, a config.json, or a folder that has one

transformers is imported late (it takes a second), and never asks the network.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthoshard.lab.train.model import SIZES, llama_settings, offline_transformers
from orthoshard.spelling import did_you_mean

# Tokens of a size of `orthoshard train` where none is asked for: the default vocabulary of its data.
VOCABULARY = 1024


@dataclass(frozen=True)
class Described:
    """``architecture`` is a class of transformers, ``settings`` its configuration."""

    name: str
    architecture: str
    settings: Any
    source: str
    parameters: float | None = None

    def on_meta(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model without weights."""
        try:
            with offline_transformers() as hf, torch.device("meta"):
                return getattr(hf, self.architecture)(self.settings).to(dtype)
        except Exception as error:  # layers fail in any way where their sizes do not fit
            raise _refused(self.name, error) from error


def describe(name: str) -> Described:
    """Raises ValueError for a name that is nowhere, naming the nearest."""
    name = "gpt2" if name == "gpt2-small" else name  # as `orthoshard bench` calls it
    if name in SIZES:
        return _size(name)
    if name in _catalogue():
        return _entry(name)
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.suffix == ".json" and path.is_file():
        return _file(path)
    if path.suffix == ".json" or os.sep in name:
        raise ValueError(f"there is no configuration at {path}; check the path")
    raise ValueError(
        f"there is no model {name!r}{did_you_mean(name, known(), 0.0)} Known: {', '.join(known())}, or the path of a "
        f"Hugging Face config.json"
    )


def known() -> list[str]:
    """Every name."""
    return [*SIZES, *_catalogue()]


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("orthoshard.lab.models").joinpath("catalogue.toml").read_text(encoding="utf-8"))


def _size(name: str) -> Described:
    with offline_transformers() as hf:
        settings = llama_settings(hf, SIZES[name], VOCABULARY, 2048)
    return Described(name, "LlamaForCausalLM", settings, f"a size of orthoshard train, {VOCABULARY} tokens")


def _entry(name: str) -> Described:
    entry = _catalogue()[name]
    with offline_transformers() as hf:
        architecture = getattr(hf, entry["class"])
        settings = architecture.config_class(**entry["config"])
    return Described(name, entry["class"], settings, entry["source"], entry["parameters"])


def _file(path: Path) -> Described:
    try:
        architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
        with offline_transformers() as hf:
            settings = hf.AutoConfig.from_pretrained(str(path), local_files_only=True)
            architecture = next((a for a in architectures if hasattr(hf, a)), None)
            if architecture is None:
                architecture = hf.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)].__name__
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ValueError(
            f"{path} describes no model that transformers has ({_reason(error)}); it needs 'model_type', and "
            f"'architectures' for anything but a causal language model"
        ) from error
    except Exception as error:  # of huggingface_hub, where values do not fit each other: no kind of ValueError
        raise _refused(str(path), error) from error
    return Described(str(path), architecture, settings, f"{path}")


def _refused(name: str, error: Exception) -> ValueError:
    return ValueError(f"transformers cannot build {name} ({_reason(error)}); put its configuration right")


def _reason(error: Exception) -> str:
    """The first line of the message; where that only announces what follows, the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[-1] if lines[0].endswith(":") else lines[0]).strip().rstrip(".")
