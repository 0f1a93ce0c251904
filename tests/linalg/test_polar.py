"""Polar factors against the singular value decomposition, and Polar Express's coefficients against the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import normal

from orthoshard.linalg.polar import POLAR, polar
from orthoshard.linalg.polar_express import minimax, polar_express, value

# Where singular values in [0.003, 1], relative to the Frobenius norm, must end.
BOUNDS = {"jordan": (0.68, 1.21), "polar_express": (0.87, 1.13)}
SHAPES = [(2, 64, 192), (2, 192, 64), (1, 127, 127), (1, 257, 33), (2, 1, 5), (2, 5, 1), (1, 1, 1)]
each_table = pytest.mark.parametrize("name", POLAR)


def spectrum(m: int, n: int, low: float, seed: int = 0) -> torch.Tensor:
    """(1, m, n) with singular values from 1 down to ``low``."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    u, v = torch.linalg.qr(normal(g, 1, m, r)).Q, torch.linalg.qr(normal(g, 1, n, r)).Q
    return (u * torch.linspace(1, low, r, dtype=torch.float64)) @ v.mT


@each_table
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("b", "m", "n"), SHAPES)
def test_singular_values_become_about_one_and_vectors_stay(name, dtype, b, m, n):
    exact = spectrum(m, n, 0.3).expand(b, m, n)
    x = exact.to(dtype)
    before = x.clone()
    p = polar(x, POLAR[name])
    assert p.shape == x.shape
    assert p.dtype == dtype
    assert torch.equal(x, before)
    slack = 0.02 if dtype == torch.bfloat16 else 1e-4
    values = torch.linalg.svdvals(p.double())
    assert values.min() >= BOUNDS[name][0] - slack
    assert values.max() <= BOUNDS[name][1] + slack
    u, _, vh = torch.linalg.svd(exact, full_matrices=False)
    # In the basis of X's singular vectors the factor is diagonal: the polynomial, applied to the singular values.
    inside = u.mT @ p.double() @ vh.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    assert off.abs().max() <= (0.03 if dtype == torch.bfloat16 else 2e-5)


@each_table
def test_each_singular_value_goes_where_the_polynomials_send_it(name):
    x = spectrum(40, 30, 0.001)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / x.norm()
    for a, b, c in POLAR[name].steps:
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(polar(x, POLAR[name]), (u * s[:, None, :]) @ vh, atol=1e-12)


@each_table
@pytest.mark.parametrize("scale", [1e-44, 1e-37, 1e-20, 1e20, 1e37])
def test_size_does_not_matter(name, scale):
    x = spectrum(33, 20, 0.1).float() / 4
    if scale == 1e-44:  # denormal: a few of the smallest float32 numbers
        x = torch.round(x * 40)
        scale = 1.401298464324817e-45
    expected = polar(x, POLAR[name])
    result = polar((x.double() * scale).float(), POLAR[name])
    assert (result - expected).abs().max() <= 2e-5


@each_table
def test_computing_in_bfloat16_changes_little_and_keeps_the_dtype(name):
    x = spectrum(48, 64, 0.2).float()
    p = polar(x, POLAR[name], torch.bfloat16)
    assert p.dtype == torch.float32
    difference = (p - polar(x, POLAR[name])).norm() / p.norm()
    assert 1e-5 < difference < 0.03


@each_table
def test_a_zero_matrix_gives_zero_and_affects_no_other(name):
    x = spectrum(12, 20, 0.1).float().repeat(3, 1, 1)
    x[1] = 0
    p = polar(x, POLAR[name])
    assert not p[1].any()
    assert torch.allclose(p[0], polar(x[:1], POLAR[name])[0], atol=1e-6)
    assert torch.equal(p[0], p[2])
    assert polar(x[:, :0], POLAR[name]).shape == (3, 0, 20)


@each_table
def test_transposing_commutes(name):
    x = spectrum(31, 12, 0.1).float()
    assert torch.allclose(polar(x.mT, POLAR[name]).mT, polar(x, POLAR[name]), atol=1e-6)


def test_derived_coefficients_are_the_published_ones():
    """arXiv 2505.16932, Algorithm 1: degree 5, l = 1e-3, before the safety factor."""
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ]
    assert np.allclose(polar_express(safety=1.0, steps=8), published, rtol=0, atol=5e-9)
    for step, (a, b, c) in zip(POLAR["polar_express"].steps[:4], published, strict=False):
        assert step == pytest.approx((a / 1.01, b / 1.01**3, c / 1.01**5), abs=1e-9)


@pytest.mark.parametrize(("lower", "upper"), [(0.03, 1.0), (0.3, 1.7), (0.999, 1.001), (1 - 1e-7, 1.0)])
def test_no_other_polynomial_is_better(lower, upper):
    """Equioscillation, and no small change of the coefficients lowers the largest error."""
    x = np.linspace(lower, upper, 20001)
    p = minimax(lower, upper)
    best = np.abs(1 - value(p, x)).max()
    assert best < 1
    ends = 1 - value(p, np.array([lower, upper]))
    assert np.allclose(ends, [best, -best], atol=1e-9) or best < 1e-12
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = tuple(np.array(p) * (1 + 1e-4 * rng.standard_normal(3)))
        assert np.abs(1 - value(other, x)).max() >= best - 1e-12


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="lower < upper"):
        minimax(-1.0, 1.0)
