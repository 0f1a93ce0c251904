"""The floors: their products are those of the step, and their flops are what they claim."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orthoshard import Dion
from orthoshard.lab.bench import floor
from orthoshard.lab.bench.floor import Buffers, DionFloor, DionTailFloor, MuonFloor, rank
from orthoshard.linalg.polar import Method

SHAPES = [(24, 10), (10, 24), (7, 7), (24, 10), (1, 5)]


def baddbmm_flops(accumulator, left, right, out_shape=None, **_):
    """2 b p q r, for the in-place form that torch's own counter leaves out."""
    b, p, q = left
    return 2 * b * p * q * right[-1]


def counted(step) -> int:
    own = {torch.ops.aten.baddbmm_: baddbmm_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step()
    return counter.get_total_flops()


def gradients(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("fraction", [1, 1 / 4, 1 / 16])
def test_dion_flops_are_four_products_of_rank_r(fraction: float):
    products = DionFloor(Buffers(gradients()), fraction)
    claimed = sum(8 * m * n * math.ceil(fraction * min(m, n)) for m, n in SHAPES)
    assert products.flops() == claimed
    assert counted(products.step) == claimed
    tail = DionTailFloor(Buffers(gradients()), fraction)
    assert tail.flops() == 3 * claimed / 4
    assert counted(tail.step) == 3 * claimed / 4


@pytest.mark.parametrize(("method", "grams"), [("newton_schulz", 5), ("gram", 2)])
def test_muon_flops_are_five_newton_schulz_steps(method: Method, grams: int):
    products = MuonFloor(Buffers(gradients()), method)
    claimed = 0
    for m, n in SHAPES:
        D, d = max(m, n), min(m, n)
        claimed += grams * 4 * D * d * d + (8 * 5 - 6 * grams) * d**3
    assert products.flops() == claimed
    assert counted(products.step) == claimed


def test_dion_products_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch):
    """One matrix at a time in its own words, with a scale that can be seen."""
    monkeypatch.setattr(floor, "SCALE", -0.5)
    given = gradients()
    buffers = Buffers(given)
    products = DionFloor(buffers, 1 / 2)
    before = {shape: (W.clone(), M.clone()) for shape, W in buffers.weights.items() for M in [buffers.momenta[shape]]}
    products.step()
    for (m, n), (W, M) in before.items():
        batch = [g for g in given if g.shape == (m, n)]
        for k, gradient in enumerate(batch):
            Q = products.right[m, n][k]
            assert Q.shape == (m, math.ceil(min(m, n) / 2))
            momentum = M[k] + gradient
            X = momentum.T
            P = X @ Q
            R = X.T @ P
            torch.testing.assert_close(buffers.momenta[m, n][k], momentum - 0.5 * (P @ R.T).T)
            torch.testing.assert_close(buffers.weights[m, n][k], W[k] - 0.5 * (P @ Q.T).T)


def test_dion_tail_does_the_products_and_sweeps_of_its_rule(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(floor, "SCALE", -0.5)
    given = gradients()
    buffers = Buffers(given)
    products = DionTailFloor(buffers, 1 / 2)
    before = {shape: (W.clone(), buffers.momenta[shape].clone()) for shape, W in buffers.weights.items()}
    products.step()
    for (m, n), (W, M) in before.items():
        batch = [g for g in given if g.shape == (m, n)]
        for k, gradient in enumerate(batch):
            N = M[k] + gradient
            P = N.T @ products.right[m, n][k]
            torch.testing.assert_close(buffers.weights[m, n][k], W[k] - 0.5 * (N @ P) @ P.T - 0.5 * N)
        torch.testing.assert_close(buffers.momenta[m, n], M)


def test_muon_products_are_newton_schulz(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(floor, "SCALE", -1e-3)
    buffers = Buffers(gradients())
    products = MuonFloor(buffers, "newton_schulz")
    before = {shape: momentum.clone() for shape, momentum in buffers.momenta.items()}
    products.step()
    (m, n), momentum = list(before.items())[-1]  # its result is the one left in the buffer
    X = 2 * momentum[0]
    for _ in range(5):
        A = X @ X.T
        X = X - 1e-3 * (A + A @ A) @ X
    torch.testing.assert_close(products.X[0].view(torch.float64)[: m * n].view(m, n), X)


def test_a_floor_adds_every_gradient_to_its_own_momentum_and_leaves_it_alone():
    given = gradients()
    copies = [g.clone() for g in given]
    buffers = Buffers(given)
    DionFloor(buffers, 1).step()
    MuonFloor(buffers).step()
    seen = dict.fromkeys(buffers.momenta, 0)
    for gradient, copy in zip(given, copies, strict=True):
        assert torch.equal(gradient, copy)
        shape = tuple(gradient.shape)
        k = seen[shape]
        seen[shape] += 1
        torch.testing.assert_close(buffers.momenta[shape][k], 3 * gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_momentum_is_kept_in_the_dtype_that_our_optimizer_keeps(dtype: torch.dtype):
    given = gradients(dtype)
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in given]
    for weight, gradient in zip(weights, given, strict=True):
        weight.grad = gradient
    optimizer = Dion(weights, lr=0.01)
    optimizer.step()
    buffers = Buffers(given)
    DionFloor(buffers, 1 / 4).step()
    for weight in weights:
        assert buffers.momenta[tuple(weight.shape)].dtype == optimizer.state[weight]["momentum"].dtype
        assert buffers.weights[tuple(weight.shape)].dtype == weight.dtype


def test_values_stay_of_their_size_over_many_steps():
    """A floor that overflowed would time infinities and denormals."""
    buffers = Buffers([g.float() * 1e-3 for g in gradients()])
    products = [DionFloor(buffers, 1), DionFloor(buffers, 1 / 4), DionTailFloor(buffers, 1 / 4), MuonFloor(buffers)]
    for _ in range(300):
        for product in products:
            product.step()
    for W, M in zip(buffers.weights.values(), buffers.momenta.values(), strict=True):
        assert W.abs().max() < 1
        assert M.abs().max() < 10


@pytest.mark.parametrize(
    ("m", "n", "fraction", "r"), [(10, 7, 1, 7), (10, 7, 1 / 4, 2), (7, 10, 1 / 64, 1), (8, 8, 0.5, 4)]
)
def test_rank(m: int, n: int, fraction: float, r: int):
    assert rank(m, n, fraction) == r
