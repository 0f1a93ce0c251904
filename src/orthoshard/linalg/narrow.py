"""Products of float32 matrices whose operands are rounded to bfloat16, with sums in float32.

    narrow_thin(A, B) = A B                   A (b, p, q), maybe a transposed view; B (b, q, r)
    narrow_outer:  X = decay X + alpha L Rᵀ   X (b, m, n) in place, L (b, m, r), R (b, n, r); CPU only

Each product is off by about 2^-9 of its norm; what it is added to stays float32. On a CPU the result of the product
itself is rounded to bfloat16 too, since torch has no product there that takes bfloat16 and gives float32; matrices go
one at a time, there and back, through buffers that stay in the cache, for fresh ones of the batch's size cost more than
they save: the system has to clear their pages. A thin result as a batch in bfloat16 made the product of twelve 768 x
3072 take 81 ms instead of 46 (2 cores). May import torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def narrow_thin(A: Tensor, B: Tensor) -> Tensor:
    """A B (b, p, r) in float32; a transposed view where A is one."""
    if A.device.type != "cpu":
        return torch.bmm(A.bfloat16(), B.bfloat16(), out_dtype=torch.float32)
    transposed = A.stride(-2) < A.stride(-1)
    slim = B.bfloat16()  # stored as B is: to turn it around costs a seventh of the product, oneDNN takes both
    stored, slim = (A.mT, slim.mT) if transposed else (A, slim)
    buffer = slim.new_empty(stored.shape[1:])
    product = slim.new_empty((B.shape[2], A.shape[1]) if transposed else (A.shape[1], B.shape[2]))
    result = A.new_empty(len(A), *product.shape)
    for matrix, other, out in zip(stored, slim, result, strict=True):
        buffer.copy_(matrix)
        out.copy_(torch.mm(*((other, buffer) if transposed else (buffer, other)), out=product))
    return result.mT if transposed else result


def narrow_outer(X: Tensor, L: Tensor, R: Tensor, alpha: float, decay: float | Tensor) -> None:
    """X = decay X + alpha L Rᵀ in place."""
    buffer = X.new_empty(X.shape[1:], dtype=torch.bfloat16)
    for x, left, right in zip(X, L, R, strict=True):
        # product and rounding apart: in one call they go entry by entry
        torch.mm((left * alpha).bfloat16(), right.bfloat16().mT, out=buffer)
        if isinstance(decay, Tensor):
            x.mul_(decay).add_(buffer)
        else:
            torch.add(buffer, x, alpha=decay, out=x)
