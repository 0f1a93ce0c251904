"""Gram matrices (r x r) of paired factors, such as LoRA's A and B, each for the update of its partner.

They are those of the weights before any moves. May import torch, `directions` and this room.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..directions.request import Sum
from .gather import Task
from .transport import Transport

Side = Literal["rows", "columns"]


def gram(X: Tensor, side: Side, transport: Transport) -> Task:
    """Return X Xᵀ if r lies along the rows of X (b, r, n), Xᵀ X if along the columns of (b, m, r): (b, r, r) in
    float64, finished, at every rank. ``X``: local pieces."""
    if transport.part.side(side).axes:  # this side is on several ranks: some rank has to have all of it
        whole = yield from transport.measured(partial(_flat_gram, side=side), X, over="both")
        return whole.unflatten(1, (transport.part.side(side).length,) * 2)
    other: Side = "columns" if side == "rows" else "rows"
    return (yield from transport.to(Sum(_gram(X, side), over=other)))


def _gram(X: Tensor, side: Side) -> Tensor:
    rows = (X if side == "rows" else X.mT).double()
    return torch.bmm(rows, rows.mT)


def _flat_gram(X: Tensor, side: Side) -> Tensor:
    return _gram(X, side).flatten(1)
