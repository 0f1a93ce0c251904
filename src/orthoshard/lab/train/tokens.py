"""Token shards on disk in llm.c's format: a header of 256 int32, then the tokens, which are read by a memory map.

    header[0] magic   header[1] version   header[2] number of tokens   the rest zero
    20240520          1                   tokens are uint16
    20240801          7                   tokens are uint32 (vocabularies above 65,536)

The header is little-endian. https://github.com/karpathy/llm.c, dev/data/data_common.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthoshard.lab.train.errors import UserError

HEADER_BYTES = 256 * 4
# (magic, version) -> how a token is stored
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}

Tokens = NDArray[Any]


def write_tokens(path: Path, tokens: Tokens) -> None:
    """Write ``tokens`` (n,) as one shard, in the smallest format that can hold them."""
    largest = int(tokens.max(initial=0))
    (magic, version), dtype = next(item for item in FORMATS.items() if largest <= np.iinfo(item[1]).max)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(dtype).tobytes())


def open_tokens(path: Path) -> Tokens:
    """Return the tokens (n,) of a shard as a read-only memory map. Raises ``UserError`` if the file is not a shard."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise UserError(f"the token file {path} cannot be read ({error.strerror}); check the path.") from error
    if size == 0:
        raise UserError(f"the token file {path} is empty; give a shard in llm.c's .bin format.")
    kind = (int(header[0]), int(header[1])) if len(header) == 256 else (0, 0)
    if kind not in FORMATS:
        raise UserError(
            f"{path} is not a token shard in llm.c's .bin format (its header does not begin with 20240520, 1 or "
            "20240801, 7); give text:PATH if it is text."
        )
    count, dtype = int(header[2]), FORMATS[kind]
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise UserError(
            f"{path} should hold {count} tokens ({HEADER_BYTES + count * dtype.itemsize} bytes) and has {size} bytes; "
            "it is cut short or damaged, so copy it again."
        )
    if count == 0:
        raise UserError(f"the token file {path} holds no tokens; give another shard.")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
