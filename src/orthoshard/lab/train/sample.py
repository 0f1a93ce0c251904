"""Sampling text from a trained model, token by token, with at most the context length that it was trained on.

p = softmax(logits / temperature); temperature 0 takes the likeliest token. The global RNG is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from orthoshard.lab.train.data import Data


@torch.no_grad()
def sample(
    model: nn.Module, data: Data, *, prompt: str, tokens: int, context: int, temperature: float, seed: int
) -> str:
    """Return ``prompt`` and the model's continuation. Without a tokenizer, the text is the numbers of the tokens."""
    device = next(model.parameters()).device
    start = data.tokenizer.encode(prompt, add_special_tokens=False).ids if data.tokenizer and prompt else []
    # Without a prompt, the first held-out token: it begins a window of real text.
    row = torch.tensor([start or [int(data.validation[0][0])]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    for _ in range(tokens):
        logits = model(input_ids=row[:, -context:], use_cache=False).logits[0, -1, : data.vocabulary].float()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(keepdim=True)
        row = torch.cat([row, chosen[None]], dim=1)
    numbers: list[int] = row[0].tolist()
    if data.tokenizer is None:
        return " ".join(map(str, numbers))
    from orthoshard.lab.train.tokenizer import decode

    return decode(data.tokenizer, numbers)
