"""The polar factor U Vᵀ of X = U diag(s) Vᵀ by odd polynomials: matrix products alone, no decomposition.

    X <- X / ||X||_F,  then for each (a, b, c):   X <- a X + (b A + c A²) X,   A = X Xᵀ

which maps each singular value s to a s + b s³ + c s⁵ and leaves U and V as they are (Newton-Schulz; Muon, K.
Jordan 2024). X is (b, d, D) with d <= D, after a transposition if needed. With p(A) = a I + b A + c A² the step is
X <- p(A) X, and the next A is p(A) A p(A). So several steps may run on (d, d) matrices alone (Gram Newton-Schulz;
Zhang, Amsel, Chen, Dao, 2026):

    A = X Xᵀ,  Q = I;   for each step:  Z = b A + c A²,  Q <- a Q + Q Z,  T = a A + A Z,  A <- a T + Z T;   X <- Q X

A round of k > 1 steps takes 4 D d² + (8 k - 6) d³ flops, k steps of the first kind k (4 D d² + 2 d³). Every (d, d)
product is symmetric, see `symmetric`. But A is rounded, and with it eigenvalues of X Xᵀ below rounding, which may
become negative. p multiplies these by a² in each step until they are far below 0 and diverge. A new round starts from
an X whose small singular values have grown: `ROUNDS` says how long rounds may be. May import torch, `accumulate`,
`host_sync`, `scale`, `products`, `symmetric` and `polar_express`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orthoshard.linalg.accumulate import scaled_copy, wide_row_squares
from orthoshard.linalg.host_sync import device_type
from orthoshard.linalg.polar_express import POLAR as POLAR
from orthoshard.linalg.polar_express import Coefficients, Triple
from orthoshard.linalg.products import multiply, multiply_add
from orthoshard.linalg.scale import largest, power_of_two
from orthoshard.linalg.symmetric import by_blocks, gram, product_flops, symmetric_product

# Steps of each round of Gram Newton-Schulz. Against the polynomials in float64, over condition numbers 1 to 1e6, aspect
# ratios 1 to 16 and four kinds of spectra (tests/linalg/test_polar_gram.py), these are about as exact as single steps
# in the same dtype. In bfloat16 two rounds send singular values to 2.2 ("jordan") and 17 ("polar_express") instead of
# 1.2 and 1.13; in float32 one round for all five steps multiplies the largest error by 10 and 190.
ROUNDS: dict[torch.dtype, tuple[int, ...]] = {
    torch.float64: (3, 2),
    torch.float32: (3, 2),
    torch.float16: (3, 2),
    torch.bfloat16: (2, 2, 1),
}

Rounds = tuple[int, ...]
Method = Literal["auto", "newton_schulz", "gram"]


@dataclass(frozen=True, slots=True)
class Iteration:
    """How matrices of one shape are iterated on: in which dtype, and how many steps each round has."""

    dtype: torch.dtype
    rounds: Rounds

    def flops(self, shape: tuple[int, int], device: str) -> float:
        """Return the flops of one matrix (m, n)."""
        d, D = min(shape), max(shape)
        blocks = by_blocks(d, self.dtype, device)
        square, grams = product_flops(d, d, blocks), product_flops(d, D, blocks)
        return sum(grams + 2.0 * D * d**2 + (1 if k == 1 else 4 * k - 3) * square for k in self.rounds)


def iteration(
    method: Method,
    coefficients: Coefficients,
    shape: tuple[int, int],
    device: str,
    held: torch.dtype,
    named: torch.dtype | None = None,
) -> Iteration:
    """Choose the iteration: one step a round under "newton_schulz"; `ROUNDS` under "gram"; under "auto"
    whichever needs fewer flops.

    It runs in the dtype that is ``named``. If none is, it runs in the one in which matrices are ``held``, but on CUDA
    in 16 bits: bfloat16 for single steps, and float16 on Gram matrices, which gain from its three extra bits and do not
    need bfloat16's exponents.
    """
    half = device == "cuda"
    single = Iteration(named or (torch.bfloat16 if half else held), (1,) * len(coefficients.steps))
    dtype = named or (torch.float16 if half else held)
    gram = Iteration(dtype, ROUNDS[dtype])
    if method == "auto":
        return min((single, gram), key=lambda each: each.flops(shape, device))
    return single if method == "newton_schulz" else gram


def polar(x: Tensor, coefficients: Coefficients, dtype: torch.dtype | None = None, rounds: Rounds = ()) -> Tensor:
    """Return the approximate polar factor of each matrix of ``x`` (b, m, n), in ``x``'s shape and dtype; on a device in
    the dtype of the iteration, which halves the bytes that its readers read.

    ``dtype``: what the iteration computes in (16 bits suffice for Muon); None: ``x``'s own. ``rounds``: the steps of
    each round, see `iteration`; none: one each. The size of ``x`` does not matter, from denormal to the largest number
    of its dtype. A zero matrix gives zero.
    """
    b, m, n = x.shape
    dtype = dtype or x.dtype
    result = x.dtype if device_type(x) == "cpu" else dtype
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=result)
    x = unit_norm(x, dtype)
    if m > n:
        # bfloat16 on a CPU has no fast kernel for products into a transposed tensor
        x = x.mT.contiguous() if x.device.type == "cpu" else x.mT
    square = [x.new_empty(b, min(m, n), min(m, n)) for _ in range(squares(rounds))]
    spare, steps = torch.empty_like(x), list(coefficients.steps)
    for k in rounds or (1,) * len(steps):
        now, steps = steps[:k], steps[k:]
        x, spare = one_round(x, now, square, spare), x
    assert not steps, (rounds, coefficients)
    return (x.mT if m > n else x).to(result)


def unit_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each matrix of ``x`` at Frobenius norm 1, or 0; a copy in ``dtype``."""
    if device_type(x) != "cpu" and x.dtype != torch.float64:  # two sweeps, and no read
        norm = wide_row_squares(x).sum(1, keepdim=True).sqrt()
        return scaled_copy(x, torch.where(norm > 0, 1 / norm, 0), dtype)
    size = largest(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32)) / power_of_two(size)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return x.mul_(torch.where(norm > 0, 1 / norm, 0)).to(dtype)


def squares(rounds: Rounds) -> int:
    """Return how many (b, d, d) tensors `one_round` needs."""
    return 2 if max(rounds, default=1) == 1 else 4


def one_round(x: Tensor, steps: Sequence[Triple], square: Sequence[Tensor], out: Tensor) -> Tensor:
    """Do these steps on x (b, d, D), into ``out``."""
    if len(steps) > 1:
        return _on_gram(x, steps, square, out)
    (a, b, c), (A, Z) = steps[0], square[:2]
    gram(x, A)
    symmetric_product(A, A, A, b, c, Z)
    return multiply_add(x, Z, x, beta=a, out=out)


def _on_gram(x: Tensor, steps: Sequence[Triple], square: Sequence[Tensor], out: Tensor) -> Tensor:
    """Compute Q X. t is free whenever q is multiplied."""
    A, z, q, t = square
    gram(x, A)
    for number, (a, b, c) in enumerate(steps):
        symmetric_product(A, A, A, b, c, z)
        if number:
            symmetric_product(q, q, z, a, 1.0, t)
            q, t = t, q
        if number < len(steps) - 1:
            symmetric_product(A, A, z, a, 1.0, t)
            symmetric_product(t, z, t, a, 1.0, A)
        if not number:
            z.diagonal(dim1=1, dim2=2).add_(a)
            q, z = z, q
    return multiply(q, x, out)
