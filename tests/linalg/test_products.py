"""Products with thin matrices, in each precision, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.cpu import WORTHWHILE
from orthoshard.linalg.products import in_tf32, multiply, multiply_add, rank_r_update_, thin_matmul

SHAPES = [(3, 5, 7, 2), (2, 300, 600, 50), (1, 300, 1, 1), (0, 5, 7, 2), (2, 5, 7, 0)]
assert WORTHWHILE <= 600  # also the way over oneDNN is taken
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
    result = thin_matmul(A, B)
    assert (result.shape, result.dtype) == ((b, p, r), dtype)
    assert off(result.double(), A.double() @ B.double()) < UNIT[dtype]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_thin_rounds_no_more_than_was_allowed(precision, transposed):
    A = normal(2, 300, 600).mT if transposed else normal(2, 600, 300)
    B = normal(2, 300, 50)
    result = thin_matmul(A, B, precision)
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
    rank_r_update_(X, L, R, -0.3, decay, precision)
    assert X.data_ptr() == pointer
    narrow = precision == "bfloat16" and dtype == torch.float32
    assert off(X.double(), exact) < (4e-3 if narrow else 2 * UNIT[dtype])
    if narrow:
        assert off(X.double(), exact) > 1e-5, "the product was made in bfloat16"


def test_what_the_narrow_product_is_added_to_keeps_its_digits():
    X = normal(1, 40, 30)
    before = X.clone()
    rank_r_update_(X, 1e-6 * normal(1, 40, 6), normal(1, 30, 6), 1.0, 1.0, "bfloat16")
    assert off(X.double(), before.double()) < 1e-5


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch):
    """A processor that makes float32 products of bfloat16 pieces, as AMX does under a setting that lets it."""
    bmm, baddbmm, baddbmm_ = torch.bmm, torch.baddbmm, Tensor.baddbmm_

    def pieces(*factors: Tensor) -> list[Tensor]:
        return [x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x for x in factors]

    monkeypatch.setattr(torch, "bmm", lambda a, b, **more: bmm(*pieces(a, b), **more))
    monkeypatch.setattr(torch, "baddbmm", lambda c, a, b, **more: baddbmm(c, *pieces(a, b), **more))
    monkeypatch.setattr(Tensor, "baddbmm_", lambda c, a, b, **more: baddbmm_(c, *pieces(a, b), **more))
    monkeypatch.setattr(cpu, "_setting", lambda: "bf16")
    cpu._rounds.cache_clear()
    yield
    cpu._rounds.cache_clear()


def test_a_processor_that_rounds_float32_is_found_out_and_gets_what_it_makes_right(amx):
    assert cpu._rounds("bf16")
    assert not cpu._rounds("ieee")
    A, B, C = normal(2, 600, 300), normal(2, 300, 50), normal(2, 600, 50)
    exact, out = A.double() @ B.double(), torch.empty(2, 600, 50)
    assert off(torch.bmm(A, B).double(), exact) > 1e-3
    for product in (thin_matmul(A, B), thin_matmul(A.mT.contiguous().mT, B), multiply(A, B), multiply(A, B, out)):
        assert product.dtype == torch.float32
        assert off(product.double(), exact) < 1e-6
    total = 0.5 * C.double() - 2 * exact
    for into in (None, out, C):
        assert off(multiply_add(C, A, B, beta=0.5, alpha=-2.0, out=into).double(), total) < 1e-6
    assert torch.equal(C, out)
    X, L, R = normal(2, 40, 30), normal(2, 40, 6), normal(2, 30, 6)
    expected = 0.9 * X.double() + 0.3 * L.double() @ R.double().mT
    rank_r_update_(X, L, R, 0.3, 0.9)
    assert off(X.double(), expected) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_two_numbers_that_tf32_holds_make_a_float32(size):
    A, B = size * normal(2, 60, 300), normal(2, 300, 50) / size
    a, b = in_tf32(A, B)

    def rounded(x: Tensor) -> Tensor:  # to TF32's 10 bits, towards 0, which is the worst a device may do
        return x.contiguous().view(torch.int32).bitwise_and(-(2**13)).view(torch.float32).double()

    exact = A.double() @ B.double()
    assert off(rounded(A) @ rounded(B), exact) > 1e-4
    assert off(rounded(a) @ rounded(b), exact) < 1e-6


def test_without_its_operator_onednn_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    A, B = normal(2, 300, 600), normal(2, 600, 50)
    assert cpu.by_onednn(A, B) == (cpu._onednn() is not None)
    by_onednn = thin_matmul(A, B)
    monkeypatch.setattr(cpu, "_onednn", lambda: None)
    assert torch.equal(thin_matmul(A, B), torch.bmm(A, B))
    assert off(by_onednn.double(), A.double() @ B.double()) < 1e-6
