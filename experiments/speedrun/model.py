"""The transformer of the optimization benchmark of modded-nanogpt (its track 3), which entries may not change.

Facts from https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, commit 04447b4: 12 layers of
width 768, heads of 128, 50,304 tokens, contexts of 1,024; RMS norms with gains; biases everywhere; query and key
normed, then rotated in half of their dimensions with frequencies from 1 to 1/1024; attention scaled by 0.12; ReLU
squared; logits bounded by 15; no tied head; computed in bfloat16, the embedding kept in it. 162.4 M parameters, of
which 38.6 M are the embedding and as many the head: 124 M were counted with one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    layers: int = 12
    width: int = 768
    head: int = 128
    vocabulary: int = 50_304
    context: int = 1024


class Linear(nn.Linear):
    """Weights in float32, multiplied in the dtype of what comes in."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gains.to(x.dtype))


def rotated(x: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x (b, t, heads, d) by their position; the second half of the pairs stays."""
    d = x.shape[-1]
    frequencies = 1024.0 ** -torch.linspace(0, 1, d // 4, device=x.device)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * F.pad(frequencies, (0, d // 4))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = width // shape.head
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q, self.k, self.v, self.attention_proj = (Linear(width, width) for _ in range(4))
        self.fc, self.mlp_proj = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        q, k, v = (each(seen).unflatten(-1, (self.heads, -1)) for each in (self.q, self.k, self.v))
        q, k = (rotated(F.rms_norm(each, each.shape[-1:])).transpose(1, 2) for each in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), scale=0.12, is_causal=True)
        x = x + self.attention_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(self.fc(self.norm2(x)).relu().square())


class Transformer(nn.Module):
    """First weights: 0 in projections back to the stream and in the head, 1 in gains, 0 in biases, standard normal in
    the embedding, and in other matrices that of torch's own Linear. An entry may choose others."""

    def __init__(self, shape: Shape = Shape(), seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width, dtype=torch.bfloat16)
        self.norm1, self.norm2 = Norm(shape.width), Norm(shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = Linear(shape.width, shape.vocabulary)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.is_meta or "gains" in name:
                    continue
                if name.startswith("embed"):
                    parameter.normal_(generator=generator)
                elif parameter.ndim == 1 or "proj" in name or name.startswith("head"):
                    parameter.zero_()
                else:
                    parameter.normal_(std=(3 * parameter.shape[1]) ** -0.5, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of (b, t) tokens, in nats a token."""
        x = self.norm1(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm2(x)).float()
        logits = 15 * logits * (logits.square() + 15**2).rsqrt()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
