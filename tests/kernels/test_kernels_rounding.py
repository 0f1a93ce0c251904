"""How kernels round to bfloat16, to the nearest and stochastically; and where what they read lies."""

from __future__ import annotations

import pytest
import torch
from passes import DEVICE, Maker, Shape, laid_out
from torch import Tensor

from orthoshard import kernels
from orthoshard.kernels import add, table
from orthoshard.kernels.add import add_scaled
from orthoshard.linalg import accumulate
from orthoshard.linalg.accumulate import Product
from orthoshard.linalg.rounding import Stochastic, places


def stochastic(W, key=5, step=0):
    """A rounding of each block of W, as the engine makes them for parameters of their own."""
    keys = torch.arange(key, key + len(W), device=DEVICE).split(1)
    found = [places(w.shape, [(0, n) for n in w.shape], k, step) for k, w in zip(keys, W, strict=True)]
    return [Stochastic(rows[0], columns[0]) for rows, columns in found]


def copied(values, key=None):
    """``values`` (float32) rounded to bfloat16 by a kernel."""
    W = torch.zeros(values.shape, dtype=torch.bfloat16, device=DEVICE)
    add_scaled([W], values, 1.0, 0.0, None if key is None else stochastic([W], key))
    return W


def hard_cases():
    """Random bits, ties, infinities, what overflows bfloat16, denormal numbers, and NaN whose payload is all ones."""
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 64, 128), generator=torch.Generator().manual_seed(0))
    ties = bits[:, :8] & ~0xFFFF | 0x8000
    edges = [0.0, 0.5, float("inf"), -float("inf"), 3.4e38, 3.39e38, -1e-40, 1e-45]
    edges = torch.tensor(edges).view(torch.int32)
    edges = torch.cat([edges, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)]).repeat(13)[:128].view(1, 1, 128)
    return torch.cat([bits.to(torch.int32), ties.to(torch.int32), edges], 1).view(torch.float32).to(DEVICE)


@pytest.mark.parametrize("key", [None, 3], ids=["to the nearest", "stochastic"])
def test_the_bits_are_torch_s(key):
    values = hard_cases()
    found, wanted = copied(values, key), torch.zeros(values.shape, dtype=torch.bfloat16, device=DEVICE)
    (rounding,) = [Tensor.copy_] if key is None else stochastic([wanted], key)
    rounding(wanted, values.clone())
    assert torch.equal(found.isnan(), wanted.isnan())
    same = ~wanted.isnan()
    assert torch.equal(found[same].view(torch.int16), wanted[same].view(torch.int16))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows interleaved"])
@pytest.mark.parametrize("common", ["right", "left"])
def test_every_pass_over_weights_rounds_as_torch_s(layout, common):
    """Sums of products differ in their last bit of float32 where torch adds in another order, and so, now and then, do
    two roundings; nearly all are the same, which other random bits would not be."""
    maker = Maker(Shape((2, 1), 37, 67, 5), "bfloat16 weights", layout)
    L, R, N, d = maker.factor(37), maker.factor(67), maker.momentum(), maker.random(3, 37, 1, dtype=torch.float32)
    taken = Product(L, R, -0.1)
    added = Product(2 * L, R, -0.1) if common == "right" else Product(L, 2 * R, -0.1)
    starts = maker.blocks(torch.bfloat16)
    passes = {
        "add_scaled": lambda W: accumulate.add_scaled(W, N, -0.1, 0.9, stochastic(W)),
        "add_products": lambda W: accumulate.add_products(N.clone(), taken, W, added, 0.9, None, stochastic(W)),
        "add_product_and_rows": lambda W: accumulate.add_product_and_rows(
            W, L, R, d, N, -0.1, 0.9, None, stochastic(W)
        ),
    }
    for name, run in passes.items():
        results = []
        for kernel in ("torch", "triton"):
            W = [laid_out(block, layout) for block in starts]
            with kernels.using(kernel):
                run(W)
            results.append(torch.cat(W))
        assert (results[0] == results[1]).float().mean() > 0.999, name


def test_one_launch_for_both_products(monkeypatch):
    launched = []
    monkeypatch.setattr(add, "launch", lambda kernel, *_, **__: launched.append(kernel))
    maker = Maker(Shape((2, 1), 9, 20, 3))
    M, W, L, R = maker.momentum(), maker.blocks(torch.float32), maker.factor(9), maker.factor(20)
    add.add_products(M, Product(L, R, -0.1), W, Product(2 * L, R, -0.1), 1.0)
    add.add_products(M, Product(L, R, -0.1), W, Product(L, 2 * R, -0.1), 1.0)
    assert launched == [add.add_two_kernel] * 2
    add.add_products(M, Product(L, R, -0.1), W, Product(2 * L, 2 * R, -0.1), 1.0)
    assert launched[2:] == []  # torch's


def test_offsets_beyond_32_bits():
    """Three rows 2^30 elements apart: the stride fits into 32 bits, the last offset does not. Only the pages that are
    touched take memory."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    W = memory.as_strided((1, 3, 40), (0, 2**30, 1))
    W.fill_(1.0)
    with kernels.using("triton"):
        add_scaled([W], torch.ones(1, 3, 40, device=DEVICE), 1.0, 1.0)
    assert (W == 2).all()


def test_a_table_has_the_address_of_every_matrix():
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32, device=DEVICE).view(2, 3, 4, 5)
    blocks = [x[0], x[1].mT.mT, x[1][:, :, 1:], x[0][:1].double()]
    found = table.groups(blocks)
    by_place = {place: group for group in found for _, place in group.table.tolist()}
    assert len(by_place) == 10
    assert [by_place[k].strides for k in (0, 3, 6, 9)] == [(5, 1)] * 4
    assert by_place[9].dtype == torch.float64
    addresses = {place: address for group in found for address, place in group.table.tolist()}
    assert addresses[4] == x[1, 1].data_ptr()
    assert addresses[7] == x[1, 1, 0, 1:].data_ptr()
    assert not by_place[0].aligned  # beside the third block, which begins 4 bytes later
    assert table.groups(blocks[:2])[0].aligned
