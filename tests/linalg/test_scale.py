"""Scales are exact powers of two, safe at both ends of every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthoshard.linalg.scale import largest, power_of_two

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_are_exact_with_finite_normal_reciprocals(dtype):
    info = torch.finfo(dtype)
    a = torch.tensor([info.smallest_normal, info.tiny * 4, 0.4, 0.5, 0.75, 1.0, 3.0, info.max / 8], dtype=dtype)
    s = power_of_two(a)
    assert s.dtype == dtype
    assert (torch.frexp(s).mantissa == 0.5).all()
    assert (1 / s >= info.tiny).all()
    assert (1 / s).isfinite().all()
    assert torch.equal(a / s * s, a)
    assert (a / s >= 0.5).all()
    assert (a / s < 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(dtype):
    info = torch.finfo(dtype)
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    a = torch.stack([torch.zeros((), dtype=dtype), least, torch.tensor(info.max, dtype=dtype)])
    a = torch.cat([a, torch.tensor([torch.inf, torch.nan], dtype=dtype)])
    s = power_of_two(a)
    assert s.isfinite().all()
    assert (1 / s).isfinite().all()
    assert s[0] == s[3] == s[4] == 1
    # The least denormal is lifted as far as a normal scale can, the largest number comes down to less than 8.
    assert a[1] / s[1] >= info.eps / 2
    assert 0.5 <= a[2] / s[2] < 8


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_within_one_octave(a):
    s = power_of_two(torch.tensor(a, dtype=torch.float64))
    assert 0.5 <= a / s.item() < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", ["plain", "transposed", "strided", "expanded"])
def test_largest(dtype, view):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 10, generator=g)
    x[0, 2, 3], x[1, 5, 9] = -50, 60
    x = x.to(dtype)
    x = {"plain": x, "transposed": x.mT, "strided": x[:, ::2, 1::2], "expanded": x[:1].expand(4, 6, 10)}[view]
    result = largest(x)
    assert result.shape == (x.shape[0], 1, 1)
    assert result.dtype == dtype
    assert result.flatten().tolist() == [matrix.abs().max().item() for matrix in x]


def test_largest_of_nothing_of_denormals_and_of_nan():
    assert largest(torch.zeros(2, 0, 3)).tolist() == [[[0.0]], [[0.0]]]
    assert largest(torch.zeros(0, 2, 3)).shape == (0, 1, 1)
    x = torch.zeros(2, 2, 2)
    x[0, 0, 1] = -1e-44
    x[1, 1, 1] = torch.nan
    assert largest(x)[0].item() == pytest.approx(1e-44, rel=0.1)
    assert largest(x)[1].isnan().all()


def test_initial_values_are_the_same_however_they_are_cut():
    from orthoshard.linalg.initial import normal_piece

    shape = (3, 70, 5)
    whole = normal_piece(shape, [(0, length) for length in shape], 7)
    assert len(whole.unique()) == whole.numel()
    assert abs(whole.mean()) < 0.1
    assert abs(whole.std() - 1) < 0.1
    for stretches in ([(1, 1), (63, 7), (0, 5)], [(0, 3), (10, 0), (0, 5)], [(0, 2), (5, 65), (2, 2)]):
        expected = whole
        for dim, (offset, length) in enumerate(stretches):
            expected = expected.narrow(dim, offset, length)
        assert torch.equal(normal_piece(shape, stretches, 7), expected)
