"""Accumulation, which also finds the largest entry while entries are in registers.

    accumulate    M = decay M + G, and the largest entry of each matrix

M, G (b, m, n). Long rows are cut into spans. There are no atomics, so that results have the same bits each time. May
import torch, `linalg` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.forms import PLAIN
from ..linalg.found_inf import FoundInf
from .device.common import TYPES
from .device.sweep import sweep_kernel
from .launch import cdiv, check, launch, number_of, wide
from .table import groups

SPAN = 1024  # columns that a program sweeps, BN at a time
BM, BN = 16, 128


def accumulate(
    momentum: Tensor, gradients: Sequence[Tensor], decay: float = 1.0, skip: FoundInf | None = None
) -> Tensor:
    """Do `linalg.accumulate.accumulate`."""
    check(momentum, *gradients)
    b, m, n = momentum.shape
    if not momentum.numel():
        return PLAIN["accumulate"](momentum, gradients, decay, skip)
    tiles, spans = cdiv(m, BM), cdiv(n, SPAN)
    largest = momentum.new_empty(b, tiles * spans, dtype=torch.promote_types(momentum.dtype, torch.float32))
    for group in groups(gradients):
        launch(
            sweep_kernel, group.matrices * tiles * spans,
            group.table, momentum, largest, m, n, SPAN, tiles, spans, *momentum.stride(), *group.strides,
            float(decay), number_of(skip),
            G_TYPE=TYPES[group.dtype], T=wide(momentum.dtype), ALIGNED=group.aligned, BM=BM, BN=BN,
        )  # fmt: skip
    return largest.amax(-1).view(-1, 1, 1).to(momentum.dtype)
