"""A small model in float64 that torch itself can cut, and its training on fixed data."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Two matrices that tensor parallelism pairs, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 20, bias=False, dtype=torch.float64)
        self.down = nn.Linear(20, 8, bias=False, dtype=torch.float64)
        self.norm = nn.LayerNorm(8, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def learn(models, optimizer, first, last):
    """Steps first..last-1, each on its own fixed batch; several models share the sum of their losses."""
    for step in range(first, last):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        sum(model(x).pow(2).sum() for model in models).backward()
        optimizer.step()


def whole(model):
    """Every parameter by name, uncut."""
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
