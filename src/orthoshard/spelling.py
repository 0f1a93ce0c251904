"""The word that a user may have meant by an unknown one. May import the standard library alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of a sentence that calls a word unknown: "; did you mean 'fsdp'?", or "." if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else "."
