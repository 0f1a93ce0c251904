"""Find the two factors of one matrix by their names. May import the standard library.

...q_proj.lora_A.default.weight  (r, in)      ...q_proj.lora_B.default.weight  (out, r)       PEFT
...q_proj.lora_a.weight          (r, in)      ...q_proj.lora_b.weight          (out, r)       torchtune
"""

from __future__ import annotations

import re
from typing import Literal

FACTOR = re.compile(r"(?:(?<=^)|(?<=\.))lora_([abAB])(?=\.|$)")
OTHER = {"a": "b", "b": "a", "A": "B", "B": "A"}


def partner_of(name: str) -> tuple[str, Literal["rows", "columns"]] | None:
    """Return the name of the other factor, and the side of this one along which their common length lies; None if the
    name is not that of a factor."""
    found = list(FACTOR.finditer(name))
    if not found:
        return None
    which = found[-1]
    partner = name[: which.start(1)] + OTHER[which[1]] + name[which.end(1) :]
    return partner, "rows" if which[1] in "aA" else "columns"
