"""X = a X + b Y, unless a flag says no: against float64, on every dtype and layout that a step may bring."""

from __future__ import annotations

import pytest
import torch

from orthoshard.linalg.accumulate import add_product, add_scaled
from orthoshard.linalg.found_inf import FoundInf, axpby_, decay_, lerp_

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "cut": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


def skip(flag):
    return FoundInf.where(torch.tensor(flag))


def tensors(dtype, like, *, layout="plain"):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 20, 30, generator=generator) for _ in range(2))
    return LAYOUTS[layout](x.to(dtype)), y.to(like)


def rounding(dtype, x):
    """Of a result of this size, rounded up to three times."""
    return 1.5 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("like", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.95, 1.0), (0.95, 0.05), (20 / 19 + 1, -20 / 19)])
def test_combine(dtype, like, a, b, layout):
    x, y = tensors(dtype, like, layout=layout)
    exact = a * x.double() + b * y.double()
    scale = max(abs(a), abs(b), 1) * rounding(torch.promote_types(dtype, torch.bfloat16), exact)
    for x_now, y_now in ((x.clone(), y), (LAYOUTS[layout](x), y)):
        axpby_([x_now], [y_now], a, b, skip(False))
        assert (x_now.double() - exact).abs().max() <= scale
    before = LAYOUTS[layout](x)
    after = LAYOUTS[layout](x)
    y[1, 2, 3], y[2, 0, 0] = torch.nan, torch.inf
    axpby_([after], [y], a, b, skip(True))
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rates_may_be_tensors(dtype):
    x, y = tensors(dtype, dtype)
    exact = 0.9 * x.double() - 0.3 * y.double()
    a, b = (torch.tensor(value, dtype=torch.float64) for value in (0.9, -0.3))
    axpby_([x], [y], a, b, skip(False))
    assert (x.double() - exact).abs().max() <= rounding(dtype, exact)


def test_blend_is_lerp():
    x, y = tensors(torch.float32, torch.float32)
    plain, guarded = x.clone(), x.clone()
    lerp_([plain], [y], 0.02, None)
    lerp_([guarded], [y], 0.02, skip(False))
    torch.testing.assert_close(plain, guarded, rtol=0, atol=5e-7)


def test_a_decay_in_bfloat16_is_not_rounded_before_it_multiplies():
    x = torch.full((1000,), 3.0, dtype=torch.bfloat16)
    decay_([x], torch.tensor(0.99, dtype=torch.float64))  # 0.98828 in bfloat16
    assert (x == torch.tensor(3 * 0.99).bfloat16()).all()


@pytest.mark.parametrize("rate", [0.02, 0.0])
@pytest.mark.parametrize("decay", [0.3, 1e-3, 0.0])
def test_bfloat16_weights_are_rounded_once_where_the_host_knows_no_rate(rate, decay):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 60, 50, generator=generator).bfloat16()
    L, R = (torch.randn(2, q, 8, generator=generator).bfloat16().float() for q in (60, 50))
    lr = torch.tensor(rate, dtype=torch.float64)
    exact = (1 - rate * decay) * W.double() - rate * torch.bmm(L.double(), R.double().mT)
    rounded_once = (exact.bfloat16().double() - exact).norm()
    add_product([W], L, R, -lr, 1 - lr * decay)
    assert (W.double() - exact).norm() <= 1.02 * rounded_once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_direction_that_is_not_finite_leaves_the_weights(dtype):
    W, update = tensors(dtype, torch.float32)
    update[0, 0, 0] = torch.nan
    before = W.clone()
    add_scaled([W], update, torch.tensor(0.0), torch.tensor(1.0), skip=skip(True))
    assert torch.equal(W, before)


@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="the kernel was mended between torch 2.13 and 2.15")
def test_the_fused_kernel_of_narrow_dtypes():
    """Why bfloat16 does not go there: torch's own SGD, to 2.13, leaves such parameters as they are on a CPU. Once no
    such torch is supported, `found_inf._alike` may let bfloat16 through."""
    parameter = torch.nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.5, fused=True).step()
    assert (parameter == 1).all()
