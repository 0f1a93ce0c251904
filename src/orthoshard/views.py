"""Views: which matrices a parameter holds. Turns the text of a group's ``view`` into dimensions and blocks. Pure.

    whole               (m, n), or experts (E, m, n)
    stack               (E, k, ..., m, n): all dimensions but the last two count matrices, such as experts' gate and up
    transposed          stored (n, m), or (E, n, m): GPT-2's Conv1D, experts stored (in, out)
    conv                a kernel (out, in, k...), as the matrix (out, in k...) that multiplies patches
    rows:64,16,16       blocks of 64, 16 and 16 rows, one below the other, each a matrix: fused query, key, value
    rows:12*64          twelve blocks of 64 rows each: heads
    rows:8*(64,32)      two matrices, interleaved: eight times 64 rows of the first and 32 of the second
    columns:...         the same for columns, side by side: heads of an output projection

Words are applied from left to right. "transposed rows:768,768,768" is GPT-2's fused query, key and value, stored as
(d, 3 d): its transpose has the blocks. A new view is one more entry in `WORDS`. May import nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Literal

Named = Literal["rows", "columns"]


@dataclass(frozen=True)
class Block:
    """The entries of a dimension that form one side of a matrix: ``times`` runs of ``height`` entries, ``period``
    apart, the first at ``start``."""

    start: int
    height: int
    period: int
    times: int

    @property
    def length(self) -> int:
        return self.height * self.times

    def before(self, entry: int) -> int:
        """Return how many of the block's entries come before this entry of the dimension."""
        rounds, rest = divmod(max(entry - self.start, 0), self.period)
        return min(rounds * self.height + min(rest, self.height), self.length)


@dataclass(frozen=True)
class MatrixView:
    """A parameter of one shape, read as matrices.

    batch_dims     number of leading dimensions that count matrices
    rows, columns  the dimensions along which each side is stored, one inside the other; only the first may be cut
    blocked        the side that is divided into blocks; None if there is one matrix
    blocks         the blocks of that side
    """

    text: str
    shape: tuple[int, ...]
    batch_dims: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    blocked: Named | None = None
    blocks: tuple[Block, ...] = ()

    def dims(self, side: Named) -> tuple[int, ...]:
        return self.rows if side == "rows" else self.columns

    def length(self, side: Named) -> int:
        """Return the number of entries of a side, over all blocks."""
        return prod(self.shape[dim] for dim in self.dims(side))

    def sides(self, side: Named) -> tuple[Block, ...]:
        """Return the blocks of a side, or one block of all its entries if it is not divided."""
        length = self.length(side)
        return self.blocks if side == self.blocked else (Block(0, length, length, 1),)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(m, n) of the matrices, each size once."""
        return list(dict.fromkeys((r.length, c.length) for r in self.sides("rows") for c in self.sides("columns")))

    @cached_property
    def plain(self) -> bool:
        """Whether a tensor of any strides can be read in this way without a copy."""
        return (
            len(self.rows) == len(self.columns) == 1 and self.batch_dims < 2 and not (self.blocks and self.batch_dims)
        )


def read_view(text: str, shape: tuple[int, ...]) -> MatrixView:
    """Return the view of a parameter of this shape. The messages of its ValueErrors continue a sentence that starts
    with the parameter's name."""
    if len(shape) < 2:
        raise ValueError(f"has shape {shape}, which is no matrix. {NO_MATRIX}")
    last = len(shape) - 1
    view = MatrixView(text, shape, last - 1, (last - 1,), (last,))
    for word in text.split() or [text]:
        name, colon, argument = word.partition(":")
        if name not in WORDS or bool(colon) != (name in ("rows", "columns")):
            raise ValueError(f"has the view {text!r}, whose {word!r} is unknown; the views are {', '.join(SPELLINGS)}")
        try:
            view = WORDS[name](view, argument)
        except ValueError as error:
            raise ValueError(f"of shape {shape} cannot have the view {text!r}: {error}") from None
    if view.batch_dims > 1 and text.split()[0] != "stack":
        raise ValueError(
            f"has shape {shape}, which is no matrix. A stack of matrices, such as experts, needs view='stack' "
            f"(Dion([{{'params': [...], 'view': 'stack'}}])), a kernel of a convolution view='conv'. {NO_MATRIX}"
        )
    return view


NO_MATRIX = (
    "Pass the model itself, so that groups are made for you (Dion(model)), or put it in a group of its own with "
    "rule='adamw'"
)


def _stack(view: MatrixView, _: str) -> MatrixView:
    if view.batch_dims < 1 or view.text.split()[0] != "stack":
        raise ValueError("'stack' comes first, and is for 3 dimensions or more (experts, ..., rows, columns)")
    return view


def _transposed(view: MatrixView, _: str) -> MatrixView:
    if view.blocked:
        raise ValueError("'transposed' comes before the blocks, which are blocks of the transpose")
    return replace(view, rows=view.columns, columns=view.rows)


def _conv(view: MatrixView, _: str) -> MatrixView:
    if len(view.shape) < 3 or view.text.split()[0] != "conv":
        raise ValueError("'conv' comes first, and is for kernels of 3 dimensions or more (out, in, k, ...)")
    return replace(view, batch_dims=0, rows=(0,), columns=tuple(range(1, len(view.shape))))


SPELLINGS = (
    "'whole'",
    "'stack'",
    "'transposed'",
    "'conv'",
    "'rows:64,16,16'",
    "'rows:12*64'",
    "'rows:8*(64,32)'",
    "'columns:...'",
)

# One block, a count times a block, or a count times a group of interleaved blocks.
ITEM = re.compile(r"(?:(\d+)\*)?(?:(\d+)|\((\d+(?:,\d+)*)\))(?:,(?=[\d(])|$)")


def _blocks(side: Named, view: MatrixView, text: str) -> MatrixView:
    if view.blocked:
        raise ValueError("it divides into blocks twice")
    whole, start, blocks, end = view.length(side), 0, list[Block](), 0
    while end < len(text) and (match := ITEM.match(text, end)):
        times, single, several = int(match[1] or 1), match[2], match[3]
        heights = [int(single)] if single else [int(height) for height in several.split(",")]
        if not times or not all(heights):
            raise ValueError(f"{match[0].rstrip(',')!r} is empty")
        period, end = sum(heights), match.end()
        if start + times * period > whole:
            raise ValueError(f"its blocks need more than the {whole} {side} of the parameter")
        if single:
            blocks += [Block(start + i * period, period, period, 1) for i in range(times)]
        else:
            ahead = [sum(heights[:i]) for i in range(len(heights))]
            blocks += [Block(start + at, height, period, times) for at, height in zip(ahead, heights, strict=True)]
        start += times * period
    if end < len(text) or not text:
        raise ValueError(f"cannot read {text[end:]!r} of its blocks; write them as 64,16,16 or 12*64 or 8*(64,32)")
    if start != whole:
        raise ValueError(f"its blocks have {start} {side} together, and there are {whole}")
    return replace(view, blocked=side, blocks=tuple(blocks)) if len(blocks) > 1 else view


WORDS: dict[str, Callable[[MatrixView, str], MatrixView]] = {
    "whole": lambda view, _: view,
    "stack": _stack,
    "transposed": _transposed,
    "conv": _conv,
    "rows": partial(_blocks, "rows"),
    "columns": partial(_blocks, "columns"),
}
