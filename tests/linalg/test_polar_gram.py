"""Gram Newton-Schulz and symmetric products against the polynomials in float64; their flops as torch counts them."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from cases import normal
from torch.utils.flop_counter import FlopCounterMode

from orthoshard.directions import Polar
from orthoshard.linalg.polar import POLAR, ROUNDS, Iteration, iteration, polar
from orthoshard.linalg.symmetric import gram, product_flops, symmetric_product

D = 64
# The spectra of what a step meets: even, falling by a power, of low rank above a small rest, with zeros.
CONDITIONS = (1.0, 1e2, 1e4, 1e6)
CASES = [("geometric", c, a) for c in CONDITIONS for a in (1, 2, 4, 16)]
CASES += [(kind, c, 4) for kind in ("linear", "low rank", "zeros") for c in CONDITIONS[1:]]
# Relative error in Frobenius norm at most this many times that of single steps in the same dtype, and so much more; and
# the largest singular value, of which the polynomials in float64 leave 1.21 and 1.13 at most.
LIMITS = {
    torch.float64: (1.0, 1e-11, 1.205),
    torch.float32: (1.0, 6e-5, 1.205),
    torch.float16: (1.1, 0.02, 1.22),
    torch.bfloat16: (1.1, 0.06, 1.28),
}
each_table = pytest.mark.parametrize("name", POLAR)
each_dtype = pytest.mark.parametrize("dtype", LIMITS)


def singular_values(kind: str, condition: float) -> torch.Tensor:
    low = 1 / condition
    if kind == "geometric":
        return torch.logspace(0, -math.log10(condition), D, dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(1, low, D, dtype=torch.float64)
    values = torch.ones(D, dtype=torch.float64)
    values[4 if kind == "low rank" else D // 2 :] = low if kind == "low rank" else 0
    return values


@cache
def matrices(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The cases in float64, and what the polynomials make of them."""
    given, exact = [], []
    for kind, condition, aspect in CASES:
        g = torch.Generator().manual_seed(aspect)
        u, v = torch.linalg.qr(normal(g, 1, D, D)).Q, torch.linalg.qr(normal(g, 1, aspect * D, D)).Q
        values = singular_values(kind, condition)
        given.append((u * values) @ v.mT)
        s = values / values.norm()
        for a, b, c in POLAR[name].steps:
            s = a * s + b * s**3 + c * s**5
        exact.append((u * s) @ v.mT)
    return given, exact


def errors(name: str, dtype: torch.dtype, rounds: tuple[int, ...]) -> tuple[list[float], float]:
    """Relative errors of the cases, and the largest singular value of any."""
    found, largest = [], 0.0
    for x, exact in zip(*matrices(name), strict=True):
        got = polar(x.to(torch.promote_types(dtype, torch.float32)), POLAR[name], dtype, rounds).double()
        found.append(float((got - exact).norm() / exact.norm()))
        largest = max(largest, float(torch.linalg.matrix_norm(got, 2)))
    return found, largest


@each_table
@each_dtype
def test_rounds_are_about_as_exact_as_single_steps(name, dtype):
    times, more, top = LIMITS[dtype]
    singles, _ = errors(name, dtype, (1,) * 5)
    rounds, largest = errors(name, dtype, ROUNDS[dtype])
    for case, one, other in zip(CASES, singles, rounds, strict=True):
        assert other <= times * one + more, (case, one, other)
    assert largest <= top


@pytest.mark.parametrize(("dtype", "rounds"), [(torch.bfloat16, (5,)), (torch.float16, (5,)), (torch.bfloat16, (3, 2))])
def test_longer_rounds_would_not_be(dtype, rounds):
    """Eigenvalues that rounding has made negative are sent away. The bounds above can tell."""
    _, largest = errors("polar_express", dtype, rounds)
    assert not largest <= 2 * LIMITS[dtype][2]


@each_table
@pytest.mark.parametrize("shape", [(40, 160), (160, 40), (33, 33), (1, 7)])
def test_rounds_are_the_same_polynomial(name, shape):
    """In float64, and also of a batch, tall matrices, zeros and tiny sizes."""
    x = normal(torch.Generator().manual_seed(1), 3, *shape)
    x[1] = 0
    single = polar(x, POLAR[name])
    for rounds in ((3, 2), (2, 2, 1), (5,)):
        assert torch.allclose(polar(x, POLAR[name], rounds=rounds), single, atol=1e-10)
    assert torch.allclose(polar(x * 1e-200, POLAR[name], rounds=(3, 2)), single, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [255, 256, 257, 301])
def test_symmetric_products_by_blocks_are_whole_ones(dtype, d):
    g = torch.Generator().manual_seed(d)
    x = normal(g, 2, d, d + 20).to(dtype)
    A = gram(x, x.new_empty(2, d, d))
    below = torch.tril_indices(d, d, -(d // 4) - 1)  # what is copied, for sure
    assert d < 256 or torch.equal(A[:, below[0], below[1]], A[:, below[1], below[0]])
    assert torch.allclose(A, x @ x.mT, rtol=1e-4, atol=1e-3)
    square = symmetric_product(A, A, A, -0.5, 1.5, torch.empty_like(A))
    expected = -0.5 * A.double() + 1.5 * A.double() @ A.double()
    assert (square - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(260, 300), (520, 256), (300, 300), (48, 200), (200, 48), (16, 16)])
@pytest.mark.parametrize("method", ["newton_schulz", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_are_those_that_are_done(shape, method, dtype):
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    named = None if dtype == torch.float32 else "bfloat16"
    chosen = iteration(method, POLAR["jordan"], shape, "cpu", torch.float32, dtype if named else None)
    with FlopCounterMode(display=False) as counter:
        polar(x, POLAR["jordan"], chosen.dtype, chosen.rounds)
    direction = Polar(polar_method=method, polar_dtype=named)
    assert direction.iteration(shape, "cpu", torch.float32) == chosen
    assert counter.get_total_flops() == chosen.flops(shape, "cpu")


def test_blocks_leave_five_eighths():
    assert product_flops(1024, 10, True) == 2 * 10 * 1024**2 * 5 / 8
    assert product_flops(1024, 10, False) == 2 * 10 * 1024**2


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_takes_fewer_flops(device):
    for D in (256, 300, 383, 385, 512, 1024, 4096):
        flops = {
            method: iteration(method, POLAR["jordan"], (D, 256), device, torch.float32).flops((D, 256), device)
            for method in ("newton_schulz", "gram", "auto")
        }
        assert flops["auto"] == min(flops.values())
        if device != "cpu":
            assert (flops["auto"] == flops["gram"]) == (2 * D > 3 * 256)
    wide = iteration("auto", POLAR["jordan"], (256, 4096), "cuda", torch.float32)
    square = iteration("auto", POLAR["jordan"], (256, 256), "cuda", torch.float32)
    assert wide == Iteration(torch.float16, (3, 2))
    assert square == Iteration(torch.bfloat16, (1,) * 5)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="polar_method='grams' is unknown"):
        Polar(polar_method="grams")
