"""Both forms of every pass, torch's and Triton's, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from passes import DEVICE, DTYPES, EMPTY, LAYOUTS, SHAPES, Maker, Shape, close, wide

from orthoshard import kernels
from orthoshard.linalg.accumulate import (
    Product,
    accumulate,
    add_product,
    add_product_and_rows,
    add_products,
    add_scaled,
    blocks,
    look_ahead,
    look_back,
    scaled_copy,
    wide_row_squares,
)
from orthoshard.linalg.found_inf import FoundInf

# Every shape and every dtype, and every layout, but not each with each: the interpreter is slow.
CASES = [
    *((shape, "float32", "contiguous") for shape in (*SHAPES, *EMPTY)),
    *(("odd", dtypes, "contiguous") for dtypes in DTYPES if dtypes != "float32"),
    *(("odd", "float32", layout) for layout in LAYOUTS if layout != "contiguous"),
    ("even", "bfloat16 weights", "transposed"),
]


@pytest.fixture(params=["torch", "triton"], autouse=True)
def form(request):
    with kernels.using(request.param):
        yield request.param


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(case))
def maker(request):
    shape, dtypes, layout = request.param
    return Maker({**SHAPES, **EMPTY}[shape], dtypes, layout)


def largest(X):
    return X.abs().amax((-2, -1), keepdim=True) if X.numel() else X.new_zeros(X.shape[0], 1, 1)


def rounded(x, dtype):
    return x.to(dtype).double()


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_accumulate(maker, decay):
    M, G = maker.momentum(), maker.blocks(maker.gradient)
    wanted = decay * wide(M) + wide(G)
    found = accumulate(M, G, decay)
    close(M, wanted, maker.state)
    assert torch.equal(found, largest(M))


def test_look_ahead_and_back(maker):
    if maker.shape == EMPTY["no columns"]:
        maker.shape = EMPTY["no rows"]  # row norms of nothing are not asked for
    M, G = maker.momentum(), maker.blocks(maker.gradient)
    accumulated = 0.9 * wide(M) + wide(G)
    N, size, squares = look_ahead(M, G, 0.9)
    close(N, (wide(G) + 0.9 * accumulated) / 1.9, maker.state)
    lengths = wide(N).square().sum(-1, keepdim=True)
    close(squares, lengths, torch.promote_types(maker.state, torch.float32), 40)
    assert size.shape == (maker.shape.b, 1, 1)
    assert (size >= largest(N)).all()  # or the longest row
    assert not N.numel() or (size.double() <= 1.001 * lengths.amax(1, keepdim=True).sqrt()).all()
    if maker.state == torch.bfloat16:
        close(M, accumulated, maker.state)
        return
    assert N is M
    look_back(list(blocks(N, G)), G, 0.9)
    close(M, accumulated, maker.state, roundings=16)


@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
def test_add_product(maker, on_device):
    W, L, R = maker.blocks(maker.weight), maker.factor(maker.shape.m), maker.factor(maker.shape.n)
    wanted = 0.99 * wide(W) - 0.1 * rounded(L, maker.weight) @ rounded(R, maker.weight).mT
    alpha, decay = (torch.tensor(x, device=DEVICE, dtype=torch.float64) for x in (-0.1, 0.99))
    add_product(W, L, R, *((alpha, decay) if on_device else (-0.1, 0.99)))
    # torch's form rounds twice where decay is a tensor, and rounds alpha L to the weight's dtype
    close(torch.cat(W), wanted, maker.weight, roundings=8 + 4 * maker.shape.r**0.5 if on_device else 8)


def test_add_product_and_rows(maker):
    L, R = maker.factor(maker.shape.m), maker.factor(maker.shape.n)
    N, rows = maker.momentum(), maker.random(maker.shape.b, maker.shape.m, 1, dtype=torch.float32)
    rows = rows.to(torch.promote_types(maker.state, torch.float32))
    W = maker.blocks(maker.weight)
    wanted = 0.99 * wide(W) - 0.1 * (wide(L) @ wide(R).mT + wide(rows) * wide(N))
    add_product_and_rows(W, L, R, rows, N, -0.1, 0.99)
    close(torch.cat(W), wanted, maker.weight, roundings=8)


@pytest.mark.parametrize("scale", ["matrices", "rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_copy(maker, scale, dtype):
    X, (b, m, n) = maker.momentum(), maker.momentum().shape
    a = maker.random(*{"matrices": (b, 1, 1), "rows": (b, m, 1), "columns": (b, 1, n)}[scale], dtype=torch.float32)
    for x, factor in ((X, a), (X.mT, a.mT)):
        copied = scaled_copy(x, factor, dtype)
        assert copied.dtype == dtype
        close(copied, wide(x) * wide(factor), dtype, roundings=2)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_wide_row_squares(size):
    maker = Maker(Shape((1, 2), 33, 300, 1))
    X = (maker.momentum() * size).mT
    close(wide_row_squares(X), wide(X).square().sum(-1, keepdim=True), torch.float64, roundings=400)


@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
def test_add_scaled(maker, on_device):
    W, update = maker.blocks(maker.weight), maker.momentum()
    wanted = 0.99 * wide(W) - 0.1 * wide(update)
    alpha, decay = (torch.tensor(x, device=DEVICE, dtype=torch.float64) for x in (-0.1, 0.99))
    add_scaled(W, update, *((alpha, decay) if on_device else (-0.1, 0.99)))
    close(torch.cat(W), wanted, maker.weight, roundings=1 if maker.weight == torch.bfloat16 else 4)


@pytest.mark.parametrize("common", ["right", "left", "none"])
def test_add_products(maker, common):
    M, W = maker.momentum(), maker.blocks(maker.weight)
    m, n = maker.shape.m, maker.shape.n
    L, L_other, R, R_other = maker.factor(m), maker.factor(m), maker.factor(n), maker.factor(n)
    a = 2.0 ** torch.arange(maker.shape.b, device=DEVICE).view(-1, 1, 1).to(M.dtype)
    taken = Product(L, R, -0.05, a)
    left, right = (L if common == "left" else L_other), (R if common == "right" else R_other)
    kept = wide(M) - 0.05 * wide(a) * (wide(L) @ wide(R).mT)
    wanted = 0.99 * wide(W) - 0.1 * rounded(left, maker.weight) @ rounded(right, maker.weight).mT
    add_products(M, taken, W, Product(left, right, -0.1), 0.99)
    close(M, kept, maker.state, roundings=8)
    close(torch.cat(W), wanted, maker.weight, roundings=8)


@pytest.mark.parametrize("size", [1e-9, 1.0])
def test_operands_of_eleven_bits_lose_no_small_step(size):
    """A step size of each matrix's own stays apart from factors that products take in 16 bits."""
    maker = Maker(Shape((2, 1), 33, 40, 17))
    M, L, R = maker.momentum(), maker.factor(33), maker.factor(40)
    rows = maker.random(3, 33, 1, dtype=torch.float32)
    alpha = size * torch.tensor([1.0, -2.0, 0.5], device=DEVICE).view(3, 1, 1)
    product = wide(L) @ wide(R).mT

    W = [torch.zeros(e, 33, 40, device=DEVICE) for e in (2, 1)]
    wanted = wide(alpha) * (product + wide(rows) * wide(M))
    add_product_and_rows(W, L, R, rows, M, alpha, 0.99, "tf32")
    assert (torch.cat(W) - wanted).norm() <= 2**-11 * wanted.norm()

    W, kept, wanted = [torch.zeros_like(weight) for weight in W], wide(M) - 0.05 * product, wide(alpha) * product
    add_products(M, Product(L, R, -0.05), W, Product(L, R, alpha), 0.99, "tf32")
    assert (torch.cat(W) - wanted).norm() <= 2**-11 * wanted.norm()
    assert (M - kept).norm() <= 2**-11 * kept.norm()


def test_rows_of_any_length_are_taken_out_of_the_momentum():
    """Under equilibration rows of L are as long as those of N, which may be beyond what float16 tells apart."""
    maker = Maker(Shape((2, 1), 33, 40, 17))
    M, L, R, W = torch.zeros_like(maker.momentum()), maker.factor(33), maker.factor(40), maker.blocks(torch.float32)
    taken = L * 10.0 ** -torch.arange(33, device=DEVICE).view(33, 1).div(4)
    add_products(M, Product(taken, R, -0.05, uneven=True), W, Product(L, R, -1e-3), 0.99, "tf32")
    wanted = -0.05 * wide(taken) @ wide(R).mT
    assert ((M - wanted).norm(dim=-1) <= 2**-10 * wanted.norm(dim=-1)).all()


def test_more_weights_than_momenta():
    """Where replicas keep the state of their own matrices only, factors of all come from `Publish`."""
    maker = Maker(Shape((2, 1), 9, 20, 3))
    M, W, L, R = maker.momentum()[:1], maker.blocks(torch.float32), maker.factor(9), maker.factor(20)
    kept, wanted = wide(M) - 0.05 * wide(L[:1]) @ wide(R[:1]).mT, wide(W) - 0.1 * wide(L) @ wide(R).mT
    add_products(M, Product(L[:1], R[:1], -0.05), W, Product(L, R, -0.1), 1.0)
    close(M, kept, torch.float32)
    close(torch.cat(W), wanted, torch.float32)


def test_blocks_of_different_layouts():
    maker = Maker(Shape((1,), 20, 33, 2))
    W = []
    for layout in LAYOUTS:
        maker.layout = layout
        W += maker.blocks(torch.float32)
    maker.shape = Shape((len(W),), 20, 33, 2)
    update = maker.random(len(W), 20, 33, dtype=torch.float32)
    wanted = wide(W) - wide(update)
    add_scaled(W, update, -1.0, 1.0)
    close(torch.cat(W), wanted, torch.float32)


def test_what_is_not_finite_is_seen(form):
    maker = Maker(Shape((3,), 20, 300, 2))
    G = maker.blocks(torch.float32)
    G[0][0, 3, 290] = float("nan")
    G[0][1, 3, 4] = float("inf")
    M = torch.zeros(3, 20, 300, device=DEVICE)
    found = accumulate(M, G, 1.0).flatten()
    assert found[0].isnan()
    assert found[1].isinf()
    assert found[2].isfinite()
    if form == "torch":
        return  # its size comes from the rows, and is no number either way
    found = look_ahead(torch.zeros_like(M), G, 0.5)[1].flatten()
    assert found[0].isnan()
    assert found[1].isinf()
    assert found[2].isfinite()


@pytest.mark.parametrize("case", [("long", "float32"), ("odd", "bfloat16 weights")], ids=", ".join)
def test_the_same_bits_each_time(case):
    def once():
        maker = Maker(SHAPES[case[0]], case[1])
        M, G, W = maker.momentum(), maker.blocks(maker.gradient), maker.blocks(maker.weight)
        Q, R = maker.factor(maker.shape.n), maker.factor(maker.shape.m)
        a = accumulate(M, G, 0.9)
        add_products(M, Product(R, Q, -0.1), W, Product(R, Q, -0.1), 0.9)
        return M, a, *W

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("up", [False, True], ids=["taken", "skipped"])
def test_a_flag_on_the_device_leaves_everything_to_the_bit(form, up, dtypes):
    """Where the gradient is NaN and the flag up, as where it is not and nobody looked."""
    skip, maker = FoundInf.where(torch.tensor(up, device=DEVICE)), Maker(SHAPES["odd"], dtypes)
    s, bad = maker.shape, float("nan") if up else 1.0
    G = [bad * gradient for gradient in maker.blocks(maker.gradient)]
    L, R, a = maker.factor(s.m), maker.factor(s.n), torch.ones(s.b, 1, 1, device=DEVICE, dtype=maker.state)
    lr, one = (torch.tensor(0.0 if up else x, device=DEVICE, dtype=torch.float64) for x in (-0.1, 0.01))
    M, W = maker.momentum(), maker.blocks(maker.weight)
    wanted_M, wanted_W = wide(M), wide(W)
    assert torch.equal(accumulate(M, G, 0.9, skip), largest(M))
    wanted_M = wanted_M if up else 0.9 * wanted_M + wide(G)
    close(M, wanted_M, maker.state, roundings=0 if up else 4)
    N, size, _ = look_ahead(M, G, 0.9, skip)
    assert torch.isfinite(size).all()
    close(N, wanted_M if up else (wide(G) + 0.9 * (0.9 * wanted_M + wide(G))) / 1.9, maker.state, 0 if up else 8)
    if N is M:
        look_back(list(blocks(N, G)), G, 0.9, skip)
    wanted_M = wanted_M if up else 0.9 * wanted_M + wide(G)
    close(M, wanted_M, maker.state, roundings=0 if up else 16)
    add_scaled(W, torch.cat(G).to(maker.state), lr, 1 - one, None, skip)
    if not up:
        wanted_W = 0.99 * wanted_W - 0.1 * wide(G)
    close(torch.cat(W), wanted_W, maker.weight, roundings=0 if up else 8)
    add_products(M, Product(L, R, -0.05, a * bad), W, Product(2 * L, R, lr), 1 - one, None, None, skip)
    if not up:
        wanted_M = wanted_M - 0.05 * wide(L) @ wide(R).mT
        wanted_W = 0.99 * wanted_W - 0.1 * rounded(2 * L, maker.weight) @ rounded(R, maker.weight).mT
    close(M, wanted_M, maker.state, roundings=0 if up else 16)
    close(torch.cat(W), wanted_W, maker.weight, roundings=0 if up else 32)
