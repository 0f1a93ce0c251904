"""What a CPU does in another way, because torch's own way is slow or inexact there. Each function returns what the
plain code beside its call returns on other devices.

    largest, column_squares         reductions over part of a tensor, which torch does not vectorize
    accumulate, look_ahead          sums and their reductions, while a matrix is in the cache
    wide_gram                       PᵀP of float32 P in float64, a piece of P at a time
    divide_columns                  mixed dtypes, which a CPU treats entry by entry
    by_onednn, thin_by_onednn       float32 products with thin results
    narrow_thin, narrow_outer       products whose operands are rounded to bfloat16
    rounds                          whether torch's setting makes float32 products less exact than float32
    pieces                          stretches of tensors that stay in the cache

M, X (b, m, n), P (b, m, r), R (b, n, r). May import torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

# Entries of a buffer that stays in a CPU's third-level cache and gives two threads enough to do: 9.1 ms for twelve
# matrices of 3072 x 768; with 2^17, which fits the second level, 13.0 (2 cores of a Zen 4).
CACHED = 2**20
# With fewer multiplications for each entry of a product, copying oneDNN's result costs more than MKL's slowness. Two
# threads of a Zen 4, (12, 3072, q) times (12, q, 192), ms by MKL and by oneDNN: q = 192 18.3 and 17.0, 768 66 and 59.
WORTHWHILE = 512
# Between the error of a float32 product here, 4e-7 of its norm, and that of bfloat16 pieces, 2e-3.
FLOAT32_ERROR = 1e-5


def largest(x: Tensor) -> Tensor:
    """Return the largest absolute entry of each matrix, (b, 1, 1). torch vectorizes aminmax over all of a contiguous
    tensor, but no reduction over part of one: one matrix at a time, in memory order, is five times as fast."""
    in_order = x.mT if x.stride(1) < x.stride(2) else x
    return torch.stack([_largest(matrix) for matrix in in_order]).view(-1, 1, 1)


def _largest(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def column_squares(R: Tensor) -> Tensor:
    """Return squared column norms, (b, 1, r), if rows are contiguous. ``vector_norm`` goes down columns entry by
    entry and takes 3 to 8 times as long as squares of a matrix that stays in the cache (12 of 3072 x 192: 17 ms
    against 2 to 6, on one core)."""
    wide = torch.promote_types(R.dtype, torch.float32)
    return torch.stack([matrix.to(wide).square().sum(0, keepdim=True) for matrix in R])


def accumulate(momentum: Tensor, gradients: Sequence[Tensor], decay: float) -> Tensor:
    """Add gradients, M = decay M + G. Returns the largest entries, found while a matrix is still in the cache, at a
    quarter of the price of a second sweep (2 cores)."""
    entries, buffer = list[Tensor](), _buffer(momentum, gradients)
    for m, g in zip(momentum, _matrices(gradients), strict=True):
        _add(g, m, decay, m, buffer)
        entries.append(_largest(m))
    return torch.stack(entries).view(-1, 1, 1)


def look_ahead(N: Tensor, momentum: Tensor, gradients: Sequence[Tensor], ahead: float, decay: float) -> Tensor:
    """Compute N = G + ahead M and, if N is another tensor, M = decay M + G. Returns the squared row norms of N."""
    lengths, buffer = list[Tensor](), _buffer(momentum, gradients)
    wide = torch.promote_types(N.dtype, torch.float32)
    for n, m, g in zip(N, momentum, _matrices(gradients), strict=True):
        _add(g, m, ahead, n, buffer)
        if N is not momentum:
            _add(g, m, decay, m, buffer)
        lengths.append(torch.linalg.vector_norm(n, dim=-1, keepdim=True, dtype=wide).square())
    return torch.stack(lengths)


def _matrices(blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    return (matrix for block in blocks for matrix in block)


def _buffer(momentum: Tensor, gradients: Sequence[Tensor]) -> Tensor | None:
    """Return rows of a wider dtype that stay in the cache, for adding wider gradients to a narrow M; None if
    not needed. torch adds mixed dtypes entry by entry: twelve matrices of 3072 x 768 take 103 ms, and 12 ms
    through a wide copy (2 cores)."""
    dtype, (rows, length) = gradients[0].dtype, momentum.shape[1:]
    if momentum.dtype.itemsize >= 4 or dtype == momentum.dtype:
        return None
    return momentum.new_empty(min(rows, max(1, CACHED // length)), length, dtype=dtype)


def _add(g: Tensor, m: Tensor, decay: float, out: Tensor, buffer: Tensor | None) -> None:
    """Compute out = G + decay M, rounded once; ``out`` may be M. All (m, n); see `_buffer`."""
    if buffer is None:
        torch.add(g, m, alpha=decay, out=out)
        return
    for to, from_, gradient in zip(*(x.split(len(buffer)) for x in (out, m, g)), strict=True):
        wide = buffer[: len(to)].copy_(from_)
        to.copy_(torch.add(gradient, wide, alpha=decay, out=wide))


def wide_gram(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return PᵀP in ``dtype``, (b, r, r)."""
    b, m, r = p.shape
    gram = p.new_zeros(b, r, r, dtype=dtype)
    rows = max(64, 2**17 // r)
    piece = p.new_empty(min(rows, m), r, dtype=dtype)
    for matrix, result in zip(p, gram, strict=True):
        for some in matrix.split(rows):
            wide = piece[: len(some)].copy_(some)
            result.addmm_(wide.mT, wide)
    return gram


def divide_columns(R: Tensor, by: Tensor) -> None:
    """Divide R by ``by`` (b, 1, r), of a wider dtype, in place."""
    for matrix, scale in zip(R, by, strict=True):
        matrix.copy_(matrix.to(scale.dtype) / scale)


def narrow_thin(A: Tensor, B: Tensor) -> Tensor:
    """Return A B (b, p, r) in float32, with operands rounded to bfloat16; a transposed view if A is one.

    The product is rounded to bfloat16 too, since torch has none that takes bfloat16 and gives float32. Matrices go one
    at a time, there and back, through buffers that stay in the cache. New buffers of the batch's size would cost more
    than they save, because the system has to clear their pages: with the thin result as one batch in bfloat16, the
    product of twelve 768 x 3072 took 81 ms instead of 46 (2 cores).
    """
    transposed = A.stride(-2) < A.stride(-1)
    slim = B.bfloat16()  # stored as B is: transposing it would cost a seventh of the product, and oneDNN takes both
    stored, slim = (A.mT, slim.mT) if transposed else (A, slim)
    buffer = slim.new_empty(stored.shape[1:])
    product = slim.new_empty((B.shape[2], A.shape[1]) if transposed else (A.shape[1], B.shape[2]))
    result = A.new_empty(len(A), *product.shape)
    for matrix, other, out in zip(stored, slim, result, strict=True):
        buffer.copy_(matrix)
        out.copy_(torch.mm(*((other, buffer) if transposed else (buffer, other)), out=product))
    return result.mT if transposed else result


def narrow_outer(X: Tensor, L: Tensor, R: Tensor, alpha: float, decay: float | Tensor) -> None:
    """Add to X in place, X = decay X + alpha L Rᵀ, with factors and product rounded to bfloat16; X stays float32."""
    buffer = X.new_empty(X.shape[1:], dtype=torch.bfloat16)
    for x, left, right in zip(X, L, R, strict=True):
        # scale and rounding apart: in one call they go entry by entry
        torch.mm((left * alpha).bfloat16(), right.bfloat16().mT, out=buffer)
        if isinstance(decay, Tensor):
            x.mul_(decay).add_(buffer)
        else:
            torch.add(buffer, x, alpha=decay, out=x)


def by_onednn(A: Tensor, B: Tensor) -> bool:
    """Return whether A B is a long float32 product, for `thin_by_onednn`. torch hands these to MKL, which reaches two
    thirds of its usual speed if the result is thin. oneDNN does not slow down (docs/log.md), but makes a new result for
    each matrix, and reads a transposed view no faster than MKL."""
    if A.device.type != "cpu" or A.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    straight = A.stride(-1) <= A.stride(-2)
    return straight and A.shape[2] >= WORTHWHILE and not rounds() and _onednn() is not None


def thin_by_onednn(A: Tensor, B: Tensor) -> Tensor:
    """Return A B (b, p, r)."""
    multiplied = _onednn()
    assert multiplied is not None
    if len(A) == 1:
        return multiplied(A[0], B[0].mT)[None]
    out = A.new_empty(len(A), A.shape[1], B.shape[2])
    for a, b, product in zip(A, B, out, strict=True):
        product.copy_(multiplied(a, b.mT))
    return out


@cache
def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return (x, w) -> x wᵀ of two matrices, or None if torch does not have it. It is the operator of the linear layers
    that torch.compile makes: the only place where torch asks oneDNN for float32 products, and not a public one."""
    operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or not torch.backends.mkldnn.is_available():
        return None

    def multiplied(x: Tensor, w: Tensor) -> Tensor:
        return cast("Tensor", operator.default(x, w, None, "none", [], ""))

    A, B = (x[0] for x in _trial())
    try:
        right = bool((multiplied(A, B.mT) - A @ B).norm() < FLOAT32_ERROR * (A @ B).norm())
    except (AttributeError, RuntimeError):
        return None
    return multiplied if right else None


def rounds() -> bool:
    """Return whether products of float32 are less exact than float32 on this CPU, under the current setting."""
    return _rounds(_setting())


def _setting() -> str:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return matmul.fp32_precision if matmul is not None else "ieee"


@cache
def _rounds(setting: str) -> bool:
    """Multiply once and look at the result: what a processor has no unit for, oneDNN computes in float32."""
    if setting in ("none", "ieee"):
        return False
    A, B = _trial()
    exact = torch.bmm(A.double(), B.double())
    return not bool((torch.bmm(A, B) - exact).norm() < FLOAT32_ERROR * exact.norm())


def _trial() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    A, B = (
        torch.randn(2, *s, generator=generator, device="cpu", dtype=torch.float32) for s in ((512, 256), (256, 128))
    )
    return A, B


def pieces(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yield the same stretches of several tensors of one shape, of at most ``size`` entries
    each if that is possible."""
    first = tensors[0]
    if first.numel() <= size or not first.ndim:
        yield tensors
        return
    rows = size * first.shape[0] // first.numel()
    for parts in zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True):
        if rows or first.ndim == 1:
            yield list(parts)
        else:
            yield from pieces([part.squeeze(0) for part in parts], size)
