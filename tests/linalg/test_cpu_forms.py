"""Forms that only a CPU takes, where torch mixes dtypes entry by entry: the same numbers as the plain formulas."""

from __future__ import annotations

import pytest
import torch

from orthoshard.linalg import accumulate, cpu
from orthoshard.linalg.accumulate import add_product, look_ahead
from orthoshard.linalg.unit import column_squares, keep_live, unit_columns


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gradient", [torch.float32, torch.float64])
@pytest.mark.parametrize("cached", [1, 2**6, 2**20])
def test_wider_gradients_are_added_to_a_narrow_momentum_and_rounded_once(monkeypatch, cached, gradient):
    monkeypatch.setattr(cpu, "CACHED", cached)
    M, G = (
        normal(3, 20, 12).bfloat16(),
        [normal(2, 20, 12, seed=1).to(gradient), normal(1, 20, 12, seed=2).to(gradient)],
    )
    expected = (torch.cat(G).double() + 0.9 * M.double()).to(gradient).bfloat16()
    sizes = accumulate.accumulate(M, G, 0.9)
    # 0.9 in the gradients' dtype, and a sum that is rounded to it first: one bfloat16 rounding at most
    assert (M.double() - expected.double()).abs().max() <= 2**-7 * expected.double().abs().max()
    assert (expected == M).double().mean() > 0.99
    assert torch.equal(sizes.view(-1), M.abs().amax((1, 2)))


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 5, 4)])
def test_nothing_to_add(shape):
    M, G = torch.zeros(shape, dtype=torch.bfloat16), [torch.zeros(shape)] if shape[0] else [torch.zeros(0, 5, 4)]
    assert accumulate.accumulate(M, G, 0.9).shape == (shape[0], 1, 1)
    N, size, squares = look_ahead(M, G, 0.9)
    assert N.shape == shape
    assert size.shape == (shape[0], 1, 1)
    assert squares.shape == (*shape[:2], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", ["rows", "columns", "every other column"])
@pytest.mark.parametrize("shape", [(3, 30, 7), (1, 1, 4), (0, 5, 3), (2, 0, 3), (2, 4, 1)])
def test_column_squares_however_they_are_stored(shape, stored, dtype):
    b, q, r = shape
    R = normal(b, q, 2 * r).to(dtype)
    R = {"rows": R[..., :r].clone(), "columns": R[..., :r].mT.contiguous().mT, "every other column": R[..., ::2]}[
        stored
    ]
    squares = column_squares(R)
    assert squares.dtype == torch.promote_types(dtype, torch.float32)
    assert squares.shape == (b, 1, r)
    assert torch.allclose(squares.double(), R.double().square().sum(1, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_columns_at_length_one_and_a_column_of_noise_keeps_its_q(dtype, dead):
    R = normal(2, 30, 5).to(dtype)
    if dead:
        R[1, :, 3] = 0
    Q = normal(2, 30, 5, seed=1).to(dtype)
    before, norms = Q.clone(), column_squares(R).sqrt()
    expected = torch.where(norms > 0, R.to(norms.dtype) / norms, 0).to(dtype)
    unit, lengths = unit_columns(R, norms, 1e-3)
    keep_live(unit, lengths, Q)
    assert torch.equal(unit, expected)
    assert torch.equal(Q, torch.where(norms > 0, expected, before))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_products_of_narrow_factors_into_float32(factors):
    W, L, R = normal(1, 40, 30).float(), normal(2, 40, 6, seed=1).to(factors), normal(2, 30, 6, seed=2).to(factors)
    weights = [W.clone(), W.clone()]
    add_product(weights, L, R, -0.01, 0.99, "bfloat16")
    for weight, left, right in zip(weights, L, R, strict=True):
        change = -0.01 * left.double() @ right.double().mT
        error = weight[0].double() - 0.99 * W[0].double() - change
        assert error.norm() <= 2**-7 * change.norm()  # three roundings to 2^-9 each, and float32's own
