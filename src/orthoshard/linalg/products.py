"""Products of a full-size matrix with a thin one, by the kernel that is fastest here and rounds as the dtype does.

    thin(A, B) = A B        A (b, p, q), maybe a transposed view; B (b, q, r) with r below p and q

Dion's two products that read M make this; at rank 1/16 they are half of a step's arithmetic. On a CPU torch hands float32
to MKL, which reaches two thirds of its usual speed when the result is thin; oneDNN does not slow down (768 x 3072 by
rank 48: 13 ms against 18 for twelve matrices on two cores; see docs/log.md). torch has no public way to ask for oneDNN
but one: leave to multiply float32 in bfloat16 pieces. Where the processor has no unit for that (AMX), oneDNN keeps
float32 throughout, and so do we ask for it only there: `_stays_float32` multiplies once and looks.

May import torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from torch import Tensor

# Below this many multiplications MKL's call costs less than oneDNN's look-up: measured, the two are alike at 2^23 to
# 2^25 on 2 cores of a Zen 4.
WORTHWHILE = 2**24
# A float32 product is off by 4e-7 of its norm here, one of bfloat16 pieces by 2e-3.
FLOAT32_ERROR = 1e-5


def thin(A: Tensor, B: Tensor) -> Tensor:
    """A B (b, p, r). Where A is a transposed view the result may be one too: the product is then Bᵀ Aᵀ, which reads
    A's memory in order."""
    if not _by_onednn(A, B):
        return torch.bmm(A, B)
    with _ONEDNN.asked():
        if A.stride(-2) < A.stride(-1):
            return torch.bmm(B.mT, A.mT).mT
        return torch.bmm(A, B)


def _by_onednn(A: Tensor, B: Tensor) -> bool:
    if A.device.type != "cpu" or A.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return A.numel() * B.shape[-1] >= WORTHWHILE and _stays_float32()


class _OneDnn:
    """The process-wide setting, put back by the last of the threads that have asked for it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._askers = 0
        self._before = "none"

    @contextmanager
    def asked(self) -> Iterator[None]:
        settings = torch.backends.mkldnn.matmul
        with self._lock:
            if not self._askers:
                self._before = settings.fp32_precision
                settings.fp32_precision = "bf16"
            self._askers += 1
        try:
            yield
        finally:
            with self._lock:
                self._askers -= 1
                if not self._askers:
                    settings.fp32_precision = self._before


_ONEDNN = _OneDnn()


@cache
def _stays_float32() -> bool:
    """Whether oneDNN is there and multiplies float32 as float32 although it may do less."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(2, *shape, generator=generator) for shape in ((512, 256), (256, 128)))
    with _ONEDNN.asked():
        product = torch.bmm(A, B)
    exact = torch.bmm(A.double(), B.double())
    return bool((product - exact).norm() < FLOAT32_ERROR * exact.norm())
