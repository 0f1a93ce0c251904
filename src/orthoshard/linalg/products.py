"""Products of full-size matrices with thin ones, in the precision that was asked for.

    thin(A, B) = A B                   A (b, p, q), maybe a transposed view; B (b, q, r) with r below p and q
    outer:  X = decay X + alpha L Rᵀ   X (b, m, n) in place, L (b, m, r), R (b, n, r)

``precision``, of float32 operands: None is torch's own setting; "float32" is float32 whatever that says; "tf32" and
"bfloat16" allow as little in the operands, with sums in float32. It is a permission:

    CUDA    float32 | TF32 | thin products of operands rounded to bfloat16, outer ones in TF32 (they write to float32)
    CPU     float32 | float32 | operands rounded to bfloat16: see `narrow`

Float64 and narrower dtypes go their own way. May import torch and `linalg.narrow`.

On a CPU torch hands float32 to MKL, which reaches two thirds of its usual speed when the result is thin; oneDNN does
not slow down (768 x 3072 by rank 48: 13 ms against 18 for twelve matrices on two cores; see docs/log.md). torch has no
public way to ask for oneDNN but one: leave to multiply float32 in bfloat16 pieces. Where the processor has no unit for
that (AMX), oneDNN keeps float32 throughout, and only there it is asked: `_stays_float32` multiplies once and looks.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from orthoshard.linalg.narrow import narrow_outer, narrow_thin

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
Scalar = float | Tensor

# Below this many multiplications MKL's call costs less than oneDNN's look-up: measured, the two are alike at 2^23 to
# 2^25 on 2 cores of a Zen 4.
WORTHWHILE = 2**24
# A float32 product is off by 4e-7 of its norm here, one of bfloat16 pieces by 2e-3.
FLOAT32_ERROR = 1e-5


def thin(A: Tensor, B: Tensor, precision: Precision | None = None) -> Tensor:
    """A B (b, p, r), in the dtype of A. Where A is a transposed view the result may be one too: the product is then
    Bᵀ Aᵀ, which reads A's memory in order."""
    if A.dtype == torch.float32 and precision == "bfloat16":
        return narrow_thin(A, B)
    if _by_onednn(A, B):
        with _lent(torch.backends.mkldnn.matmul, "bf16"):  # pyright: ignore[reportAttributeAccessIssue] missing in torch's stubs
            return torch.bmm(B.mT, A.mT).mT if A.stride(-2) < A.stride(-1) else torch.bmm(A, B)
    with _setting(A, precision):
        return torch.bmm(A, B)


def outer(X: Tensor, L: Tensor, R: Tensor, alpha: float, decay: Scalar, precision: Precision | None = None) -> None:
    """X = decay X + alpha L Rᵀ in place, in one sweep, without forming L Rᵀ.

    Each entry is rounded to X's dtype once, also in bfloat16; once more where ``decay`` is a tensor. On a CPU a float32
    X decays first: MKL would do it in a slower sweep of its own (measured: rank 48 of 3072 x 768, 19.0 ms against 27.2
    for twelve matrices, 16.0 without decay).
    """
    if narrows(X.dtype, X.device, precision):
        narrow_outer(X, L, R, alpha, decay)
        return
    first = isinstance(decay, Tensor) or (X.device.type == "cpu" and X.dtype in (torch.float32, torch.float64))
    if first and (isinstance(decay, Tensor) or decay != 1):
        X.mul_(decay)
    with _setting(X, precision):
        X.baddbmm_(L, R.mT, beta=1.0 if isinstance(decay, Tensor) or first else decay, alpha=alpha)


def narrows(dtype: torch.dtype, device: torch.device, precision: Precision | None) -> bool:
    """Whether `outer` rounds the factors of a product that is added to such a matrix to bfloat16."""
    return dtype == torch.float32 and precision == "bfloat16" and device.type == "cpu"


def _by_onednn(A: Tensor, B: Tensor) -> bool:
    if A.device.type != "cpu" or A.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return A.numel() * B.shape[-1] >= WORTHWHILE and _stays_float32()


def _setting(x: Tensor, precision: Precision | None) -> Any:
    """On CUDA, cuBLAS's own switch for as long as the product is launched."""
    if precision is None or x.dtype != torch.float32 or x.device.type != "cuda":
        return nullcontext()
    return _lent(torch.backends.cuda.matmul, "ieee" if precision == "float32" else "tf32")


_LOCK = Lock()


@contextmanager
def _lent(settings: Any, value: str) -> Generator[None]:
    """A process-wide setting, for one thread at a time, and put back."""
    with _LOCK:
        before = settings.fp32_precision
        settings.fp32_precision = value
        try:
            yield
        finally:
            settings.fp32_precision = before


@cache
def _stays_float32() -> bool:
    """Whether oneDNN is there and multiplies float32 as float32 although it may do less."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or matmul is None:
        return False
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(2, *shape, generator=generator) for shape in ((512, 256), (256, 128)))
    with _lent(matmul, "bf16"):
        product = torch.bmm(A, B)
    exact = torch.bmm(A.double(), B.double())
    return bool((product - exact).norm() < FLOAT32_ERROR * exact.norm())
