"""A model by name or path, as a configuration and as modules on the meta device.

    name   a size of `orthoshard train`, an entry of `catalogue.toml`, a config.json, or a folder with one

transformers is imported late, because that takes a second, and is kept offline.
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

# Vocabulary of the sizes of `orthoshard train`: the default of its data.
VOCABULARY = 1024


@dataclass(frozen=True)
class Described:
    """A model's description: ``architecture`` is a class of transformers, ``settings`` is its configuration."""

    name: str
    architecture: str
    settings: Any
    source: str
    parameters: float | None = None

    def on_meta(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model without weights. Raises ValueError if its configuration is inconsistent."""
        try:
            with offline_transformers() as hf, torch.device("meta"):
                return getattr(hf, self.architecture)(self.settings).to(dtype)
        except Exception as error:  # layers raise anything if their sizes do not fit
            raise _refused(self.name, error) from error


def describe(name: str) -> Described:
    """Return the model of a name or path. Raises ValueError for an unknown one, with the most similar name."""
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
    """Return all names of models."""
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
    except Exception as error:  # huggingface_hub's, which are not ValueErrors, for values that contradict each other
        raise _refused(str(path), error) from error
    return Described(str(path), architecture, settings, f"{path}")


def _refused(name: str, error: Exception) -> ValueError:
    return ValueError(f"transformers cannot build {name} ({_reason(error)}); correct its configuration")


def _reason(error: Exception) -> str:
    """Return the first line of the message, or the last if the first only announces more."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[-1] if lines[0].endswith(":") else lines[0]).strip().rstrip(".")
