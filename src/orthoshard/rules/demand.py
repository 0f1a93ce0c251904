"""What one update of one matrix costs, said once beside each rule, in the letters of its formula.

Rules say what they ask of the engine (`Summed`, `Dealt`, `Shared` stand for the requests `Sum`, `Each`, `Share`) and
how much they compute and touch; `cost` turns that into flops, memory traffic and bytes on the wire for a layout.
A dimension is ``"rows"`` or ``"columns"`` of the matrix, as long as it is on a rank, or a length of its own.
May import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from .request import Dim

Length = Literal["rows", "columns"] | int


@dataclass(frozen=True)
class Summed:
    """`Sum` of a tensor with these dimensions for each matrix."""

    dims: tuple[Length, ...]
    dtype: torch.dtype
    over: Dim
    averaged: bool = False


@dataclass(frozen=True)
class Dealt:
    """`Each` of a tensor (p, q) for each matrix."""

    dims: tuple[Length, Length]
    dtype: torch.dtype
    over: Dim
    partial: Dim | None = None
    averaged: bool = False


@dataclass(frozen=True)
class Shared:
    """`Share`: what is asked inside, and the results that travel to the other replicas."""

    inside: tuple[Summed | Dealt, ...]
    results: tuple[tuple[tuple[Length, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Demand:
    """Of one (m, n) matrix and one step.

    divisible  flops that divide among all ranks that cut the matrix, done again at every replica
    shared     flops that divide among replicas too
    accesses   memory accesses (reads and writes) an entry of the matrix, of the passes over all of it
    asks       in the order of the update
    published  `Publish`: what travels from the replica that keeps a matrix's state to the others
    applied    of ``divisible``, the flops of writing the weights, done at every replica whoever keeps the state
    surveyed   of ``accesses``, those to weights and gradients by which every replica takes part
    """

    divisible: float = 0.0
    shared: float = 0.0
    accesses: float = 0.0
    asks: tuple[Summed | Shared, ...] = field(default=())
    published: tuple[tuple[tuple[Length, ...], torch.dtype], ...] = ()
    applied: float = 0.0
    surveyed: float = 0.0
