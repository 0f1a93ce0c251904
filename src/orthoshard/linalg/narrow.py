"""Products of float32 matrices whose operands are rounded to bfloat16, with sums in float32.

    narrow_thin(A, B) = A B                   A (b, p, q), maybe a transposed view; B (b, q, r)
    narrow_outer:  X = decay X + alpha L Rᵀ   X (b, m, n) in place, L (b, m, r), R (b, n, r); CPU only

Each product is off by about 2^-9 of its norm; what it is added to stays float32. On a CPU the result of the product
itself is rounded to bfloat16 too, since torch has no product there that takes bfloat16 and gives float32; matrices go
one at a time through a buffer that stays in the cache, for a fresh one of full size costs more than it saves: the
system has to clear its pages. May import torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def narrow_thin(A: Tensor, B: Tensor) -> Tensor:
    """A B (b, p, r) in float32; a transposed view where A is one."""
    if A.device.type != "cpu":
        return torch.bmm(A.bfloat16(), B.bfloat16(), out_dtype=torch.float32)
    b, p, q = A.shape
    right = B.bfloat16()
    if A.stride(-2) < A.stride(-1):
        result = right.new_empty(b, B.shape[-1], p)
        buffer = right.new_empty(q, p)
        for whole, slim, out in zip(A.mT, right.mT, result, strict=True):
            torch.mm(slim, buffer.copy_(whole), out=out)
        return result.float().mT
    result = right.new_empty(b, p, B.shape[-1])
    buffer = right.new_empty(p, q)
    for whole, slim, out in zip(A, right, result, strict=True):
        torch.mm(buffer.copy_(whole), slim, out=out)
    return result.float()


def narrow_outer(X: Tensor, L: Tensor, R: Tensor, alpha: float, decay: float | Tensor) -> None:
    """X = decay X + alpha L Rᵀ in place."""
    left = torch.mul(L, alpha, out=torch.empty_like(L, dtype=torch.bfloat16))
    buffer = left.new_empty(X.shape[1:])
    for x, slim, right in zip(X, left, R.bfloat16(), strict=True):
        torch.mm(slim, right.mT, out=buffer)
        if isinstance(decay, Tensor):
            x.mul_(decay).add_(buffer)
        else:
            torch.add(buffer, x, alpha=decay, out=x)
