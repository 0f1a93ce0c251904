"""Products in float32 that are exact to float32 whatever torch's process-wide setting says, and
products that need not be.

    multiply(A, B) = A B          A (b, p, q), B (b, q, r)
    multiply_add    C' = beta C + alpha A B
    thin_matmul(A, B) = A B       A full-size, maybe a transposed view; B thin: r below p and q
    rank_r_update_  X = decay X + alpha L Rᵀ   X (b, m, n) in place, L (b, m, r), R (b, n, r)

`torch.set_float32_matmul_precision` lets torch round float32 operands to TF32 or bfloat16, on CUDA and on CPUs that
have a unit for it (AMX). It holds for the process. An optimizer may not change it, because other threads would see
that, and may not follow it, because Cholesky factors and noise floors are those of float32. So if torch's setting would
round, torch gets operands whose product it makes right all the same: see `_whole`.

``precision`` of `thin_matmul`, `narrow_matmul` and `rank_r_update_` says how far float32 operands may be rounded beyond
that. None and "float32": not at all. "tf32" and "bfloat16": to about the bits of these formats, with sums in float32:

    "tf32"      CUDA: thin products of float16 operands, which hold 11 bits as TF32 does; outer ones of operands that
                hold 16, in three products of bfloat16. CPU: float32
    "bfloat16"  CUDA: thin products in bfloat16, outer ones as for "tf32". CPU: both in bfloat16

If the user does not choose, "tf32" applies on CUDA and "float32" elsewhere: see `resolved`.

TF32 itself is only available through torch's process-wide setting. Products of 16 bits are at least as fast and need no
switch: on an H100 8192 x 2048 by rank 512 ran at 49 TFLOP/s in float32, 201 in TF32, 539 in bfloat16
(benchmarks/results).

Float64 and narrower dtypes stay as they are. May import torch, `linalg.cpu` and `linalg.host_sync`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.host_sync import device_type

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
Scalar = float | Tensor

# Masks the 13 bits of float32 that TF32 does not have.
TF32_BITS = -(2**13)


def multiply(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """Return A B (b, p, r), in ``out`` if it is given."""
    a, b = _whole(A, B)
    if a.dtype == A.dtype:
        return torch.bmm(a, b, out=out)
    product = torch.bmm(a, b)
    return product.to(A.dtype) if out is None else out.copy_(product)


def multiply_add(
    C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return beta C + alpha A B (b, p, r), in ``out`` if it is given; that may be C."""
    a, b = _whole(A, B)
    if a.dtype == C.dtype:
        if out is C:
            return C.baddbmm_(a, b, beta=beta, alpha=alpha)
        return torch.baddbmm(C, a, b, beta=beta, alpha=alpha, out=out)
    total = torch.baddbmm(C.to(a.dtype), a, b, beta=beta, alpha=alpha)
    return total.to(C.dtype) if out is None else out.copy_(total)


def resolved(precision: Precision | None, device: str) -> Precision:
    """Return the precision that a user means by ``precision``; None leaves it to the kind of device."""
    return precision or ("tf32" if device == "cuda" else "float32")


def thin_matmul(A: Tensor, B: Tensor, precision: Precision | None = None) -> Tensor:
    """Return A B (b, p, r), in the dtype of A. If A is a transposed view the result may be one too: the product is then
    Bᵀ Aᵀ, which reads A's memory in order. ``precision`` matters on a CPU only; accelerators use `narrow_matmul`."""
    if A.dtype == torch.float32 and precision == "bfloat16" and A.device.type == "cpu":
        return cpu.narrow_thin(A, B)
    return cpu.thin_by_onednn(A, B) if cpu.by_onednn(A, B) else multiply(A, B)


def narrow_dtype(dtype: torch.dtype, device: str, precision: Precision | None) -> torch.dtype | None:
    """Return the dtype to which full-size matrices of ``dtype`` are copied for `narrow_matmul`; None if that is no
    better than `thin_matmul`."""
    if dtype != torch.float32 or device != "cuda":
        return None
    return {"tf32": torch.float16, "bfloat16": torch.bfloat16}.get(precision or "float32")


def narrow_matmul(A: Tensor, B: Tensor) -> Tensor:
    """Return A B (b, p, r) in float32, for A in 16 bits and B in float32, which is rounded to A's dtype. In float16 no
    entry may be much above 1; smaller ones are exact to 2^-25."""
    if A.device.type == "cpu":  # only for tests: the same terms, added up in float32
        return torch.bmm(A.float(), B.to(A.dtype).float())
    return torch.bmm(A, B.to(A.dtype), out_dtype=torch.float32)


def rank_r_update_(
    X: Tensor, L: Tensor, R: Tensor, alpha: float, decay: Scalar, precision: Precision | None = None
) -> None:
    """Add a product, X = decay X + alpha L Rᵀ, in place and in one sweep, without forming L Rᵀ.

    Each entry is rounded to X's dtype once, also in bfloat16; once more if ``decay`` is a tensor. On a CPU a float32
    X decays first: MKL would do it in a slower sweep of its own (measured: rank 48 of 3072 x 768, 19.0 ms against 27.2
    for twelve matrices, 16.0 without decay).
    """
    if rounds_to_bf16(X.dtype, X.device, precision):
        cpu.narrow_outer(X, L, R, alpha, decay)
        return
    first = isinstance(decay, Tensor) or (X.device.type == "cpu" and X.dtype in (torch.float32, torch.float64))
    if first and (isinstance(decay, Tensor) or decay != 1):
        X.mul_(decay)
    beta = 1.0 if isinstance(decay, Tensor) or first else decay
    if narrow_dtype(X.dtype, device_type(X), precision) is not None:
        _add_in_halves(X, L, R, alpha, beta)
    else:
        multiply_add(X, L, R.mT, beta=beta, alpha=alpha, out=X)


def _add_in_halves(X: Tensor, L: Tensor, R: Tensor, alpha: float, beta: float) -> None:
    """Add a product, X = beta X + alpha L Rᵀ, whose float32 factors are sums of two bfloat16 numbers; the
    product of the smaller two is left out. It is one product three times as long, at ten times the speed
    of float32, exact to 2^-16."""
    if X.device.type != device_type(X):  # a dry run counts what Triton's form does: one product, in TF32
        X.baddbmm_(L.to(X.dtype), R.to(X.dtype).mT, beta=beta, alpha=alpha)
        return
    (a, da), (b, db) = _halves(L), _halves(R)
    left, right = torch.cat([a, a, da], -1), torch.cat([b, db, b], -1)
    torch.baddbmm(X, left, right.mT, torch.float32, beta=beta, alpha=alpha, out=X)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, torch.sub(x, high).bfloat16()


def rounds_to_bf16(dtype: torch.dtype, device: torch.device, precision: Precision | None) -> bool:
    """Return whether `rank_r_update_` rounds the factors of a product that is added to such a matrix to bfloat16."""
    return dtype == torch.float32 and precision == "bfloat16" and device.type == "cpu"


def _whole(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors whose product torch makes as exactly as float32 would: nearly always A and B themselves.

    A CPU that rounds gets them in float64. On CUDA, where float64 may take 64 times as long, each is the sum of two
    numbers that TF32 holds, and A B is one product three times as long; what it leaves out is below float32's own
    rounding.
    """
    if A.dtype != torch.float32:
        return A, B
    if A.device.type == "cuda":
        return in_tf32(A, B) if torch.backends.cuda.matmul.fp32_precision == "tf32" else (A, B)
    if A.device.type == "cpu" and cpu.rounds():
        return A.double(), B.double()
    return A, B


def in_tf32(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (b, p, 3q) and (b, 3q, r): A B = a b + a (B - b) + (A - a) b + ..., where TF32
    holds a and b to the bit."""
    a, b = (x.contiguous().view(torch.int32).bitwise_and(TF32_BITS).view(torch.float32) for x in (A, B))
    return torch.cat([a, a, A - a], -1), torch.cat([b, B - b, b], -2)
