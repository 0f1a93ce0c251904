"""Stochastic rounding: what it keeps, what it may give, and that its mean is right, by statistics that can fail."""

from __future__ import annotations

import math

import pytest
import torch

from orthoshard.linalg import rounding
from orthoshard.linalg.rounding import LARGEST, Stochastic, places

SAMPLES = 4096


def placed(shape, pieces, key, step):
    """R and C of one parameter."""
    rows, columns = places(shape, pieces, torch.tensor([key]), step)
    return rows[0], columns[0]


def narrowed(x: torch.Tensor, key: int = 7, step: int = 0) -> torch.Tensor:
    """x (p, q), rounded."""
    weight = torch.empty(x.shape, dtype=torch.bfloat16)
    Stochastic(*placed(x.shape, [(0, n) for n in x.shape], key, step))(weight, x.clone())
    return weight


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


def values() -> torch.Tensor:
    """Float32 numbers of all kinds between neighbours of bfloat16, with the chance of the outer one, by float64."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.randint(1, 0x7F7F, (64,), generator=generator, dtype=torch.int32)
    upper[:16] = torch.randint(0, 0x80, (16,), generator=generator, dtype=torch.int32)  # denormal, and 0
    lower = torch.randint(1, 0x10000, (64,), generator=generator, dtype=torch.int32)
    lower[::8] = torch.tensor([1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x4000], dtype=torch.int32)
    x = ((upper << 16) | lower).view(torch.float32)
    return torch.cat([x, -x])


def test_only_neighbours_and_in_the_right_shares():
    """Chi-square over values of all signs and sizes: a share that is off by 2% in all of them is seen."""
    x = values()
    got = narrowed(x[:, None].expand(-1, SAMPLES).contiguous()).double()
    exact = x.double()
    inner = (x.view(torch.int32) & -65536).view(torch.float32).double()
    outer = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert ((got == inner[:, None]) | (got == outer[:, None])).all()
    share = (got == outer[:, None]).double().mean(1)
    expected = (exact - inner) / (outer - inner)
    variance = expected * (1 - expected) / SAMPLES
    ordinary = variance > 10 / SAMPLES**2  # the normal approximation needs some of either kind
    chi = ((share - expected) ** 2 / variance)[ordinary].sum()
    count = int(ordinary.sum())
    assert count > 100
    assert abs(chi - count) < 5 * math.sqrt(2 * count)
    assert ((share - expected).abs() <= 12 / SAMPLES)[~ordinary].all()
    off = (share + 0.02 * expected - expected) ** 2 / variance
    assert off[ordinary].sum() - count > 5 * math.sqrt(2 * count), "the statistic would see a bias"


def test_what_is_representable_stays_as_it_is():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    for step in range(3):
        got = narrowed(every.float(), step=step)
        same = bits(got) == bits(every)
        assert (same | (every.isnan() & got.isnan())).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_above_the_largest_number_it_rounds_to_nearest(sign):
    above = torch.tensor([0x7F7F0001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)
    x = sign * above.view(torch.float32)
    x = torch.cat([x, torch.tensor([float("nan"), -float("nan")])])
    x = torch.cat([x, torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    got = narrowed(x[:, None].expand(-1, 500).contiguous())
    expected = x.to(torch.bfloat16)[:, None].expand(-1, 500)
    assert (got.isnan() == expected.isnan()).all()
    assert torch.equal(got[:5], expected[:5])
    below = torch.tensor([0x7F7E0000, 0x7F7E8000], dtype=torch.int32).view(torch.float32)
    got = narrowed(sign * below[1].expand(1, 500).contiguous())
    assert got.abs().double().unique().tolist() == [float(below[0]), LARGEST]


def ups(rows: int = 512, columns: int = 512, key: int = 7, step: int = 0) -> torch.Tensor:
    """Of ones and a third of a unit: how far each went from its mean, at variance 1."""
    up = (narrowed(torch.full((rows, columns), 1 + 1 / 3 / 128), key, step) > 1).double()
    share = float(torch.tensor(1 + 1 / 3 / 128).double() - 1) * 128
    return (up - share) / math.sqrt(share * (1 - share))


def test_entries_rows_columns_steps_and_parameters_are_independent():
    one = ups()
    pairs = {
        "below": (one[1:], one[:-1]),
        "beside": (one[:, 1:], one[:, :-1]),
        "diagonal": (one[1:, 1:], one[:-1, :-1]),
        "transposed": (one, one.T),
        "a power of two away": (one[256:], one[:256]),
        "next step": (one, ups(step=1)),
        "another parameter": (one, ups(key=8)),
    }
    for name, (a, b) in pairs.items():
        z = (a * b)[torch.ones_like(a, dtype=torch.bool) if name != "transposed" else torch.ones_like(a).triu(1) > 0]
        assert abs(z.sum() / math.sqrt(z.numel())) < 4.5, name
    for dim in (0, 1):  # sums of rows and columns scatter as sums of independent entries do
        sums = one.sum(dim) / math.sqrt(one.shape[dim])
        assert abs(sums.square().sum() - sums.numel()) < 5 * math.sqrt(2 * sums.numel())
    # four corners of rectangles: what is R xor C alone would fail here
    corners = one[::2, ::2] * one[1::2, ::2] * one[::2, 1::2] * one[1::2, 1::2]
    assert abs(corners.sum() / math.sqrt(corners.numel())) < 4.5


def test_one_entry_over_many_steps_has_the_right_mean():
    x = torch.full((8, 8), 1 + 0.1 / 128)
    total = sum((narrowed(x, step=step).double() - 1) * 128 for step in range(2000))
    z = (total / 2000 - 0.1) / math.sqrt(0.09 / 2000)
    assert z.abs().max() < 4.5
    assert abs(z.square().sum() - 64) < 5 * math.sqrt(128)


@pytest.mark.parametrize("shape", [(), (11,), (7, 9), (3, 5, 4), (2, 3, 2, 6)])
def test_a_piece_gets_what_the_whole_gets(shape):
    whole = placed(shape, [(0, n) for n in shape], 3, 4)
    assert all(x.shape == shape for x in whole)
    pieces = [(n // 3, n - n // 2) for n in shape]
    part = placed(shape, pieces, 3, 4)
    index = tuple(slice(start, start + length) for start, length in pieces)
    for x, y in zip(part, whole, strict=True):
        assert torch.equal(x, y[index])
    assert placed((4, 6), [(4, 0), (0, 6)], 3, 4)[0].shape == (0, 6)


@pytest.mark.parametrize("shape", [(), (11,), (3, 5, 4)])
def test_parameters_together_get_what_each_gets_alone(shape):
    pieces = [(0, n) for n in shape]
    for together, *alone in zip(
        places(shape, pieces, torch.tensor([3, -9]), 4),
        placed(shape, pieces, 3, 4),
        placed(shape, pieces, -9, 4),
        strict=True,
    ):
        assert torch.equal(together, torch.stack(alone))


def test_a_step_that_the_host_does_not_know_is_the_same():
    for known, unknown in zip(
        placed((5, 6), [(0, 5), (0, 6)], 1, 12),
        placed((5, 6), [(0, 5), (0, 6)], 1, torch.tensor(12.0)),
        strict=True,
    ):
        assert torch.equal(known, unknown)


def test_strides_and_stretches_change_nothing(monkeypatch):
    x = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))
    rows, columns = placed(x.shape, [(0, n) for n in x.shape], 5, 6)
    whole = torch.empty(x.shape, dtype=torch.bfloat16)
    Stochastic(rows, columns)(whole, x.clone())
    assert not torch.equal(whole, x.bfloat16())
    for chunk in (1, 30, 70, 3000):
        monkeypatch.setattr(rounding, "CHUNK", chunk)
        got = torch.empty(3, 50, 40, dtype=torch.bfloat16).mT
        Stochastic(rows, columns)(got, x.clone())
        assert torch.equal(got, whole), chunk
    flat = torch.empty(6000, dtype=torch.bfloat16)
    Stochastic(rows.flatten(), columns.flatten())(flat, x.flatten())
    assert torch.equal(flat, whole.flatten())
