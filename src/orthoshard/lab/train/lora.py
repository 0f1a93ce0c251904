"""LoRA (arXiv 2106.09685) by PEFT: in every linear layer but the head, W becomes W + B A, and only A and B are trained.

    W (d_out, d_in)  frozen      A (rank, d_in)  random      B (d_out, rank)  zero, so W + B A = W at first

PEFT's factor alpha / rank is 1 here, so --lr alone decides the size of a step. Checkpoints hold only the adapters, and
identify the frozen weights by ``frozen_digest``. peft is imported late: it belongs to the extra `hf`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from orthoshard.lab.train.errors import UserError, first_line


def add_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Add adapters to ``model`` in place and freeze the rest. A depends on ``seed`` alone. Raises ``UserError``."""
    try:
        import peft
    except ImportError as error:
        raise UserError("--lora needs the package peft: pip install 'orthoshard[hf]'.") from error
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(
            f"no LoRA adapters can be put into {type(model).__name__} ({first_line(error)}); leave --lora out to train "
            "every weight."
        ) from error


def frozen_digest(model: nn.Module) -> str | None:
    """Return a hash of names, dtypes, shapes and bits of all frozen parameters, or None if there are none."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not frozen:
        return None
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
