"""Token shards for training and validation from the name of a corpus, prepared once and kept in the cache.

    cache/<corpus>-<digest>/   tokenizer.json   train.bin   validation.bin

The digest covers text, vocabulary and split. So a changed text or setting is prepared again, and an existing folder is
never rewritten. A folder is written under another name and renamed, so it is complete even if the process is killed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orthoshard.lab.train.config import DataConfig
from orthoshard.lab.train.corpus import Corpus, read_corpus
from orthoshard.lab.train.errors import UserError, disk_errors
from orthoshard.lab.train.tokens import Tokens, open_tokens, write_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RECIPE = "2"  # part of the digest: raise it when the preparation changes


@dataclass(frozen=True)
class Data:
    name: str
    train: tuple[Tokens, ...]
    """Shards (n_i,)."""
    validation: tuple[Tokens, ...]
    vocabulary: int
    """All tokens are below this number."""
    tokenizer: Tokenizer | None
    digest: str
    """Changes with the text, the tokenizer and the split."""


def prepare(config: DataConfig, own_tokenizer: Tokenizer | None = None) -> Data:
    """Return the tokens of ``config.corpus``, from the cache if they are there. Raises ``UserError``.

    ``own_tokenizer`` is the tokenizer of a model to fine-tune; it is used instead of training one.
    """
    kind, colon, rest = config.corpus.partition(":")
    if colon and kind == "bin":
        return _shards(rest, config, own_tokenizer)
    corpus = read_corpus(config.corpus, config.cache)
    given = _given_tokenizer(config, own_tokenizer)
    vocabulary_key = given.to_str() if given is not None else str(config.vocabulary)
    digest = hashlib.sha256()
    for part in (RECIPE, vocabulary_key, repr(config.held_out), *corpus.documents):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    identity = digest.hexdigest()[:16]
    folder = config.cache / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', corpus.name)}-{identity}"
    if not folder.is_dir():
        _write(folder, corpus, given, config)
    from orthoshard.lab.train.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        train, validation = open_tokens(folder / "train.bin"), open_tokens(folder / "validation.bin")
    except UserError as error:
        raise UserError(
            f"the prepared data in {folder} are damaged; delete that folder to have them prepared again ({error})"
        ) from error
    return Data(
        name=corpus.name,
        train=(train,),
        validation=(validation,),
        vocabulary=tokenizer.get_vocab_size(),
        tokenizer=tokenizer,
        digest=identity,
    )


def _given_tokenizer(config: DataConfig, own: Tokenizer | None) -> Tokenizer | None:
    if config.tokenizer is None:
        return own
    from orthoshard.lab.train.tokenizer import load_tokenizer

    return load_tokenizer(config.tokenizer.expanduser())


def _write(folder: Path, corpus: Corpus, given: Tokenizer | None, config: DataConfig) -> None:
    """Split every document, train the BPE on the training part only, and write the folder."""
    from orthoshard.lab.train.tokenizer import encode, train_bpe

    train, validation = split(corpus.documents, config.held_out)
    if not any(train) or not any(validation):
        raise UserError(
            f"the corpus {corpus.name} is too short to be split ({sum(map(len, corpus.documents))} characters); "
            "give more text."
        )
    tokenizer = given if given is not None else train_bpe(train, config.vocabulary)
    with disk_errors(folder.parent, "free some space, or give another folder with --cache."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as temporary:
            inside = Path(temporary) / "data"
            inside.mkdir()
            tokenizer.save(str(inside / "tokenizer.json"))
            write_tokens(inside / "train.bin", encode(tokenizer, train))
            write_tokens(inside / "validation.bin", encode(tokenizer, validation))
            try:
                os.rename(inside, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same bytes
                    raise


def split(documents: tuple[str, ...], held_out: float) -> tuple[list[str], list[str]]:
    """Return two lists: the beginning of each document for training, and its last share ``held_out`` for validation."""
    cuts = [len(text) - round(len(text) * held_out) for text in documents]
    train = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
    return train, [text[cut:] for text, cut in zip(documents, cuts, strict=True)]


def _shards(pattern: str, config: DataConfig, own: Tokenizer | None) -> Data:
    """Return the tokens of llm.c shards.

    Files with `val` in their name are for validation; if there are none, the end of the last shard is.
    """
    expanded = str(Path(pattern).expanduser())
    paths = sorted(Path(p) for p in glob.glob(expanded))
    if paths and all(p.is_dir() for p in paths):
        paths = sorted(p for folder in paths for p in folder.glob("*.bin"))
    if not paths:
        raise UserError(f"no token shard matches {pattern}; give bin:PATTERN, such as bin:fineweb/*.bin.")
    validation = [p for p in paths if "val" in p.name]
    train = [p for p in paths if p not in validation]
    if not train:
        raise UserError(f"{pattern} matches only validation shards (`val` in the name); include training shards.")
    shards = [open_tokens(p) for p in train]
    if validation:
        held_out = [open_tokens(p) for p in validation]
    else:
        last = shards.pop()
        cut = len(last) - round(len(last) * config.held_out)
        shards.append(last[:cut])
        held_out = [last[cut:]]
    digest = hashlib.sha256()
    for path, tokens in zip(train + validation, [open_tokens(p) for p in train + validation], strict=True):
        # Shards may have many gigabytes: the digest covers only names, sizes and the first and last 4096 tokens.
        digest.update(f"{path.name} {len(tokens)}\n".encode())
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
    tokenizer = _given_tokenizer(config, own)
    vocabulary = tokenizer.get_vocab_size() if tokenizer is not None else config.vocabulary
    return Data(
        paths[0].parent.name or "shards", tuple(shards), tuple(held_out), vocabulary, tokenizer, digest.hexdigest()[:16]
    )
