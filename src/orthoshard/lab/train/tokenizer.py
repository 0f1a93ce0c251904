"""Byte-level BPE by Hugging Face `tokenizers`, trained on the corpus itself and lossless on any text.

Token 0 ends a document. Tokens 1 to 256 are the bytes, so no text is unknown. The rest are merges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.tokens import Tokens

END_OF_TEXT = "<|endoftext|>"


def train_bpe(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE with at most ``vocabulary`` tokens (fewer if the text has no more pairs to merge)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a `tokenizer.json`. Raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}; give --tokenizer the path of a tokenizer.json.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for bad files
        raise UserError(f"{path} is not a tokenizer.json of Hugging Face tokenizers ({error}).") from error


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a document, or None if the tokenizer has none under a usual name."""
    for name in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]"):
        token: int | None = tokenizer.token_to_id(name)
        if token is not None:
            return token
    return None


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Tokens:
    """Return all documents as one row of tokens (n,), each followed by the end-of-text token if there is one."""
    end = end_of_text(tokenizer)
    tail = np.array([] if end is None else [end], dtype=np.uint32)
    parts: list[Tokens] = []
    for encoded in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        parts += [np.array(encoded.ids, dtype=np.uint32), tail]
    return np.concatenate(parts) if parts else tail


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)
