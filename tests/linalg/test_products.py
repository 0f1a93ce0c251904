"""Products with thin matrices, in each precision, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthoshard.linalg import products
from orthoshard.linalg.products import WORTHWHILE, outer, thin

SHAPES = [(3, 5, 7, 2), (2, 600, 300, 50), (1, 300, 1, 1), (0, 5, 7, 2), (2, 5, 7, 0)]
# 2 * 600 * 300 * 50 multiplications: also the way over oneDNN is taken
assert WORTHWHILE < 2 * 600 * 300 * 50
UNIT = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def off(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|; 0 where there is nothing."""
    return float((x - exact).norm() / exact.norm()) if exact.numel() and float(exact.norm()) else 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("transposed", [False, True])
def test_thin_is_the_product(shape, dtype, transposed):
    b, p, q, r = shape
    A = normal(b, q, p, dtype=dtype).mT if transposed else normal(b, p, q, dtype=dtype)
    B = normal(b, q, r, dtype=dtype)
    result = thin(A, B)
    assert (result.shape, result.dtype) == ((b, p, r), dtype)
    assert off(result.double(), A.double() @ B.double()) < UNIT[dtype]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_thin_rounds_no_more_than_was_allowed(precision, transposed):
    A = normal(2, 300, 600).mT if transposed else normal(2, 600, 300)
    B = normal(2, 300, 50)
    result = thin(A, B, precision)
    assert result.dtype == torch.float32
    error = off(result.double(), A.double() @ B.double())
    if precision == "bfloat16":
        assert 5e-4 < error < 2.0**-8, "operands and result are rounded to 8 bits"
    else:
        assert error < 1e-6, "a CPU has no TF32"


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("decay", [1.0, 0.9, torch.tensor(0.9)])
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_outer_adds_in_place(dtype, decay, precision):
    X, L, R = normal(3, 40, 30, dtype=dtype), normal(3, 40, 6, dtype=dtype), normal(3, 30, 6, dtype=dtype)
    exact = float(decay) * X.double() - 0.3 * L.double() @ R.double().mT
    pointer = X.data_ptr()
    outer(X, L, R, -0.3, decay, precision)
    assert X.data_ptr() == pointer
    narrow = precision == "bfloat16" and dtype == torch.float32
    assert off(X.double(), exact) < (4e-3 if narrow else 2 * UNIT[dtype])
    if narrow:
        assert off(X.double(), exact) > 1e-5, "the product was made in bfloat16"


def test_what_the_narrow_product_is_added_to_keeps_its_digits():
    X = normal(1, 40, 30)
    before = X.clone()
    outer(X, 1e-6 * normal(1, 40, 6), normal(1, 30, 6), 1.0, 1.0, "bfloat16")
    assert off(X.double(), before.double()) < 1e-5


def test_onednn_is_asked_only_where_it_keeps_float32(monkeypatch: pytest.MonkeyPatch):
    A, B = normal(2, 600, 300), normal(2, 300, 50)
    asked: list[str] = []
    lent = products._lent
    monkeypatch.setattr(products, "_lent", lambda settings, value: asked.append(value) or lent(settings, value))
    for stays in (False, True):
        monkeypatch.setattr(products, "_stays_float32", lambda stays=stays: stays)
        thin(A, B)
    assert asked == ["bf16"], "only where the processor keeps float32"
    thin(A[:, :6], B)
    thin(A.double(), B.double())
    assert asked == ["bf16"], "small products and other dtypes are left to torch"


def test_a_processor_that_narrows_is_found_out(monkeypatch: pytest.MonkeyPatch):
    products._stays_float32.cache_clear()
    bmm = torch.bmm

    def as_amx(a: Tensor, b: Tensor) -> Tensor:
        return bmm(a, b) if a.dtype == torch.float64 else bmm(a.bfloat16(), b.bfloat16()).to(a.dtype)

    monkeypatch.setattr(torch, "bmm", as_amx)
    assert not products._stays_float32()
    products._stays_float32.cache_clear()


def test_the_process_wide_setting_is_put_back():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    thin(normal(2, 600, 300), normal(2, 300, 50))
    assert settings.fp32_precision == before
    with pytest.raises(RuntimeError):
        thin(normal(2, 600, 300), normal(2, 301, 50))
    assert settings.fp32_precision == before
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())  # the two ways to say it still agree
