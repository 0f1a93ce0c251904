"""The passes as formulas in float64, and tensors of awkward layouts to try them on.

A case is made of b matrices in blocks, whose places in memory `LAYOUTS` name. Kernels run on the GPU where there is
one, and in Triton's interpreter on the CPU where there is none: the same tests in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# How a block (e, m, n) lies in memory. Kernels read 16 bytes at a time where they may, so what may not is here.
LAYOUTS = {
    "contiguous": lambda e, m, n: ((m * n, n, 1), 0),
    "transposed": lambda e, m, n: ((m * n, 1, m), 0),
    "rows of a longer matrix": lambda e, m, n: (((m + 3) * n, n, 1), 2 * n),
    "columns of a wider matrix": lambda e, m, n: ((m * (n + 5), n + 5, 1), 0),
    "off by one": lambda e, m, n: ((m * n, n, 1), 1),
    "every second column": lambda e, m, n: ((2 * m * n, 2 * n, 2), 0),
    "rows interleaved": lambda e, m, n: ((n, e * n, 1), 0),  # what heads are to a weight
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A copy of ``values`` (e, m, n) that lies as named, in memory filled with NaN."""
    e, m, n = values.shape
    strides, offset = LAYOUTS[layout](e, m, n)
    size = offset + 1 + sum((length - 1) * stride for length, stride in zip((e, m, n), strides, strict=True))
    memory = torch.full((max(size, 1),), float("nan"), dtype=values.dtype, device=values.device)
    block = memory.as_strided((e, m, n), strides, offset)
    block.copy_(values)
    return block


@dataclass(frozen=True)
class Shape:
    blocks: tuple[int, ...]
    m: int
    n: int
    r: int

    @property
    def b(self) -> int:
        return sum(self.blocks)


# Tiles are 16 to 128 wide, spans 256 long.
SHAPES = {
    "one entry": Shape((1,), 1, 1, 1),
    "one row": Shape((1, 2), 1, 37, 1),
    "one column": Shape((2,), 37, 1, 1),
    "odd": Shape((1, 2), 19, 67, 5),
    "even": Shape((2,), 64, 32, 16),
    "long": Shape((1,), 7, 270, 3),
    "high": Shape((1,), 270, 7, 3),
    "full rank": Shape((1,), 35, 41, 35),
}
EMPTY = {
    "no matrices": Shape((0,), 5, 7, 2),
    "one block empty": Shape((0, 1), 5, 7, 2),
    "no rows": Shape((2,), 0, 7, 2),
    "no columns": Shape((2,), 5, 0, 2),
}

# Dtypes of state, gradients and weights.
DTYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16 weights": (torch.float32, torch.bfloat16, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64, torch.float64),
}


class Maker:
    """Random tensors of one case."""

    def __init__(self, shape: Shape, dtypes: str = "float32", layout: str = "contiguous", device: str = DEVICE) -> None:
        self.shape = shape
        self.state, self.gradient, self.weight = DTYPES[dtypes]
        self.layout = layout
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(dtype).to(self.device)

    def momentum(self) -> Tensor:
        s = self.shape
        return laid_out(self.random(s.b, s.m, s.n, dtype=self.state), self.layout)

    def blocks(self, dtype: torch.dtype) -> list[Tensor]:
        s = self.shape
        return [laid_out(self.random(e, s.m, s.n, dtype=dtype), self.layout) for e in s.blocks]

    def factor(self, length: int) -> Tensor:
        return self.random(self.shape.b, length, self.shape.r, dtype=self.state)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: float = 4.0) -> None:
    """Up to so many roundings of ``dtype``, of the larger of 1 and the entry; what is added has about size 1."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)
    worst = float(error.max()) / torch.finfo(dtype).eps if error.numel() else 0.0
    assert worst <= roundings, f"{worst:.3g} roundings of {dtype}"


def wide(blocks: list[Tensor] | Tensor) -> Tensor:
    """A float64 copy, of a list as one batch."""
    return (blocks if isinstance(blocks, Tensor) else torch.cat(list(blocks))).double().clone()
