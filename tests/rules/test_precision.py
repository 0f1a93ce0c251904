"""`matmul_precision`: the update that float32 makes, to what the operands lost, and nothing made of rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthoshard import Dion, DionTail

RULES = [Dion, DionTail]
STEPS = 12


def gradients(steps: int, rank: int | None = None) -> list[Tensor]:
    """Of one matrix 96 x 64, singular values falling as 1/k; ``rank``: no more directions than that."""
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(96, 64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    sizes = 1 / torch.arange(1, 65)
    if rank is not None:
        sizes[rank:] = 0
        return [(left * sizes * (1 + 0.1 * step)) @ right.T for step in range(steps)]
    return [(left * sizes + 0.02 * torch.randn(96, 64, generator=generator)) @ right.T for _ in range(steps)]


def trained(rule: type, grads: list[Tensor], precision: str | None, **options: object) -> Tensor:
    weight = nn.Parameter(torch.zeros(96, 64))
    optimizer = rule([("w", weight)], lr=0.1, weight_decay=0.0, matmul_precision=precision, **options)
    for gradient in grads:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("rule", RULES)
def test_the_update_is_float32s_to_what_operands_lost(rule):
    grads = gradients(STEPS)
    exact = trained(rule, grads, "float32", rank_fraction=0.25)
    assert torch.equal(exact, trained(rule, grads, None, rank_fraction=0.25))
    narrow = trained(rule, grads, "bfloat16", rank_fraction=0.25)
    error = float((narrow - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.02, error


@pytest.mark.parametrize("rule", RULES)
def test_rounding_moves_no_weight(rule):
    """Four directions in the gradients and a rank of 16: the other twelve columns are rounding of the operands, and an
    orthonormalization would bring them to length 1."""
    grads = gradients(STEPS, rank=4)
    options = {"rank_fraction": 0.25} | ({"tail_weight": 0.0} if rule is DionTail else {})
    weight = trained(rule, grads, "bfloat16", **options)
    sizes = torch.linalg.svdvals(weight)
    assert float(sizes[3]) > 0.5 * float(sizes[0]), "four directions, all at the same pace"
    assert float(sizes[4]) < 0.05 * float(sizes[0]), "and no fifth"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="matmul_precision"):
        Dion([nn.Parameter(torch.zeros(4, 4))], matmul_precision="half")
