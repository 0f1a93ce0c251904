"""How kernels round to bfloat16, to the nearest and at random; and where what they read lies."""

from __future__ import annotations

import pytest
import torch
from passes import DEVICE, Maker, Shape

from orthoshard import kernels
from orthoshard.kernels import table
from orthoshard.kernels.add import add_product, add_product_and_rows, add_products, add_scaled
from orthoshard.linalg.accumulate import Product


def copied(values, seed=None):
    """``values`` (float32) rounded to bfloat16 by a kernel."""
    W = torch.zeros(values.shape, dtype=torch.bfloat16, device=DEVICE)
    add_scaled([W], values, 1.0, 0.0, seed=seed)
    return W


def test_the_nearest_is_torch_s():
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 64, 128), generator=torch.Generator().manual_seed(0))
    ties = bits[:, :8] & ~0xFFFF | 0x8000
    edges = torch.tensor([0.0, 0.5, float("inf"), -float("inf"), 3.4e38, 1e-45, -1e-40, 1.0]).repeat(1, 8, 16)
    values = torch.cat([bits.to(torch.int32).view(torch.float32), ties.to(torch.int32).view(torch.float32), edges], 1)
    values = values.to(DEVICE)
    found, wanted = copied(values), values.bfloat16()
    assert torch.equal(found.isnan(), wanted.isnan())
    same = ~wanted.isnan()
    assert torch.equal(found[same].view(torch.int16), wanted[same].view(torch.int16))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_rounding_at_random_has_no_bias(share):
    step = 2.0**-7  # of bfloat16 above 1
    values = torch.full((2, 64, 128), 1 + share * step, device=DEVICE)
    for sign in (1, -1):
        found = copied(sign * values, seed=5).float() * sign
        up = (found - 1) / step
        assert ((up == 0) | (up == 1)).all()
        # 16384 throws: 4 standard deviations
        assert abs(float(up.mean()) - share) <= 4 * (share * (1 - share) / up.numel()) ** 0.5
        # 32 rows of 8 neighbours and 64 rows: as even in parts as in all, which equal bits in neighbours would not be
        assert abs(float(up.view(-1, 8).mean(1).std()) - (share * (1 - share) / 8) ** 0.5) <= 0.01


def test_random_bits_depend_on_seed_matrix_and_entry_and_not_on_the_tiling():
    values = torch.full((2, 40, 200), 1.001, device=DEVICE)
    first, again, other = copied(values, 7), copied(values, 7), copied(values, 2**40 + 7)
    on_device = copied(values, torch.tensor(7, device=DEVICE))
    assert torch.equal(first, again)
    assert torch.equal(first, on_device)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    maker = Maker(Shape((2,), 40, 200, 2))
    W, zero = [torch.zeros_like(first)], torch.zeros(2, 40, 2, device=DEVICE)
    add_product_and_rows(W[0], zero, maker.factor(200), torch.ones(2, 40, 1, device=DEVICE), values, 1.0, 1.0, seed=7)
    assert torch.equal(W[0], first)  # tiles of another size


def test_every_pass_over_weights_rounds_at_random():
    """A sum of many steps, each below half of what bfloat16 resolves, arrives; rounded to the nearest it stays away."""
    maker = Maker(Shape((1,), 32, 64, 1))
    L, R = torch.ones(1, 32, 1, device=DEVICE), torch.ones(1, 64, 1, device=DEVICE)
    for seeds, arrives in ((range(16), True), ([None] * 4, False)):
        single, both = ([torch.ones(1, 32, 64, dtype=torch.bfloat16, device=DEVICE)] for _ in range(2))
        M = maker.momentum()
        for seed in seeds:
            add_product(single, L, R, 2.0**-10, 1.0, seed=seed)
            add_products(M, Product(L, R, 0.0), both, Product(L, R, 2.0**-10), 1.0, seed=seed)
        for weights in (single, both):
            mean = float(weights[0].float().mean())
            assert abs(mean - (1 + 16 * 2.0**-10 if arrives else 1)) < 0.002


def test_offsets_beyond_32_bits():
    """Two rows 2^31 elements apart: where 32 bits overflow. Only the pages that are touched take memory."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    W = memory.as_strided((1, 2, 40), (0, 2**31, 1))
    W.fill_(1.0)
    with kernels.using("triton"):
        add_scaled([W], torch.ones(1, 2, 40, device=DEVICE), 1.0, 1.0)
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
