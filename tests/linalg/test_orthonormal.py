"""Orthonormal columns: every method on every case in every dtype, against a long-double oracle."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EACH, IDS, M, R, conditioned, normal, sine, skew
from householder import householder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthoshard.linalg import cholesky
from orthoshard.linalg.cholesky import cholesky_qr
from orthoshard.linalg.columns import NoiseFloor
from orthoshard.linalg.host_sync import no_host_sync


def fixed(y: Tensor, floor: NoiseFloor = None) -> Tensor:
    """Cholesky QR as a GPU runs it: the host reads nothing."""
    with no_host_sync():
        return cholesky_qr(y, floor)


def on_device(y: Tensor, floor: NoiseFloor = None) -> Tensor:
    """As a GPU runs it where the host may look once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "sync_is_free", lambda x: False)
        return cholesky_qr(y, floor)


METHODS = {"householder": householder, "cholesky_qr": cholesky_qr, "adaptive on a device": on_device, "fixed": fixed}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def tolerance(y: Tensor) -> float:
    return 1e-5 if y.dtype != torch.float64 else 1e-14


@each_method
@pytest.mark.parametrize(("case", "dtype"), EACH, ids=IDS)
def test_every_case(method, case, dtype):
    y = case.y(dtype)
    before = y.clone()
    p = method(y)
    assert torch.equal(y, before)
    assert p.dtype == torch.promote_types(dtype, torch.float32)
    assert p.isfinite().all()
    expected = case.live(dtype)
    for matrix, given_ in zip(p, y, strict=True):
        kept = (matrix != 0).any(0)
        assert expected is None or kept.nonzero()[:, 0].tolist() == expected
        assert skew(matrix) <= tolerance(y)
        columns = given_.to(p.dtype)[:, kept]
        columns = columns / columns.abs().amax(0)
        # positive diagonal of R, as far as it stands above rounding
        r = (matrix[:, kept].double().mT @ columns.double()).diagonal()
        assert (r > -1e-3 * columns.double().norm(dim=0)).all()
        lapack = sine(torch.linalg.qr(columns).Q, columns)
        assert sine(matrix[:, kept], columns) <= 10 * max(lapack, torch.finfo(p.dtype).eps)


@each_method
@pytest.mark.parametrize("name", ["condition-1e0", "condition-1e2", "square", "duplicates", "crowd", "rank-6", "wide"])
def test_methods_agree_and_signs_are_those_of_a_positive_diagonal(method, name):
    y = next(case for case in CASES if case.name == name).y(torch.float64)
    p = method(y)
    r = p.mT @ y
    kept = (p != 0).any(1)
    assert (r.diagonal(dim1=1, dim2=2)[kept] > 0).all()
    assert torch.tril(r, -1).abs().max() <= 1e-11 * y.abs().max()
    assert torch.allclose(p, householder(y), atol=1e-10)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dependent_column_changes_no_other(method, dtype):
    duplicates = next(case for case in CASES if case.name == "duplicates")
    y = duplicates.y(dtype)
    live = duplicates.live(dtype)
    assert live is not None
    assert (method(y)[:, :, live] - method(y[:, :, live])).abs().max() <= 20 * torch.finfo(dtype).eps


@each_method
@pytest.mark.parametrize("name", ["condition-1e1", "condition-1e5", "duplicates", "rank-6"])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 3.0, 1e20, 1e37])
def test_the_size_of_the_input_does_not_matter(method, name, scale):
    y = next(case for case in CASES if case.name == name).y(torch.float32)
    y = y / y.abs().max()
    p = method(y)
    scaled = method(y * scale)
    assert torch.equal(p == 0, scaled == 0)
    for a, b, matrix in zip(p, scaled, y, strict=True):
        kept = (a != 0).any(0)
        # A scale that is no power of two rounds Y itself, as Householder's own rounding does.
        lapack = sine(torch.linalg.qr(matrix[:, kept]).Q, matrix[:, kept])
        assert sine(b[:, kept], a[:, kept]) <= 10 * max(lapack, 1e-6)


@each_method
@pytest.mark.parametrize(("dtype", "length", "apart"), [(torch.float32, 2.0**-45, 0.02), (torch.float64, 1e-12, 5e-4)])
def test_short_columns_are_judged_by_their_own_rounding(method, dtype, length, apart):
    """Two that are close to each other, beside a long one."""
    first, second, third = torch.linalg.qr(normal(torch.Generator().manual_seed(8), 60, 3))[0].unbind(1)
    y = torch.stack([first, length * second, length * (second + apart * third)], 1)[None].to(dtype)
    assert (method(y) != 0).any(1).all()


@pytest.mark.parametrize("name", ["duplicates", "rank-6", "zero", "zero-columns", "condition-1e2"])
def test_on_a_device_dependent_columns_are_settled_by_the_first_gram_matrix(name, monkeypatch):
    monkeypatch.setattr(cholesky, "_all_passes", lambda *_: pytest.fail("begun anew"))
    on_device(next(case for case in CASES if case.name == name).y(torch.float32))


@each_method
def test_a_power_of_two_changes_not_one_bit(method):
    y = next(case for case in CASES if case.name == "condition-1e5").y(torch.float32)
    # where the host may look, sizes beyond 2^±40 take other passes
    assert torch.equal(method(y * 2.0**-20), method(y * 2.0 ** (30 if method is on_device else -80)))


@each_method
def test_matrices_of_a_batch_do_not_affect_each_other(method):
    names = [case.name for case in CASES if case.y(torch.float32).shape[1:] == (M, R)]
    batches = [next(c for c in CASES if c.name == name).y(torch.float32) for name in names]
    together = method(torch.cat(batches))
    for name, y, p in zip(names, batches, together.split([len(y) for y in batches]), strict=True):
        if name in ("condition-1e7", "condition-1e8"):
            continue
        alone = method(y)
        assert torch.equal(alone == 0, p == 0), name
        for a, b, matrix in zip(alone, p, y, strict=True):
            kept = (a != 0).any(0)
            columns = matrix[:, kept] / matrix[:, kept].abs().amax(0)
            lapack = sine(torch.linalg.qr(columns).Q, columns)
            assert sine(a[:, kept], b[:, kept]) <= 10 * max(lapack, 1e-6), name


@each_method
@pytest.mark.parametrize("shape", [(1, 127, 127), (1, 257, 127), (3, 1, 1), (2, 5, 1), (0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_shapes(method, shape):
    y = normal(torch.Generator().manual_seed(3), *shape).float()
    p = method(y)
    assert p.shape == shape
    assert all(skew(matrix) <= 1e-5 for matrix in p)
    assert shape[1] == 0 or bool((p != 0).any(1).all())


@each_method
def test_views_are_treated_as_the_matrices_they_show(method):
    y = normal(torch.Generator().manual_seed(4), 2, 20, 61).float()
    assert (method(y.mT) - method(y.mT.contiguous())).abs().max() <= 2e-6


@each_method
def test_floor_sets_short_columns_aside(method):
    y = normal(torch.Generator().manual_seed(5), 2, 60, 8)
    y = y / y.norm(dim=1, keepdim=True)
    y[:, :, 2] *= 1e-4
    y[0, :, 5] *= 1e-4
    p = method(y, torch.full((2, 1, 1), 2e-4, dtype=torch.float64))
    assert (p == 0).all(1).nonzero().tolist() == [[0, 2], [0, 5], [1, 2]]
    kept = [0, 1, 3, 4, 6, 7]
    assert torch.allclose(p[0][:, kept], method(y[:1, :, kept])[0], atol=1e-13)
    floor = torch.zeros(2, 1, 8, dtype=torch.float64)
    floor[1, 0, 3] = 1.5
    assert (method(y, floor) == 0).all(1).nonzero().tolist() == [[1, 3]]


@each_method
def test_floor_is_the_error_of_each_column_also_in_what_is_left_of_it(method):
    """Column 1 differs from column 0 by less than the errors of the two, column 2 by more."""
    y = normal(torch.Generator().manual_seed(6), 1, 60, 3)
    y = y / y.norm(dim=1, keepdim=True)
    y[:, :, 1:] = y[:, :, :1] + y[:, :, 1:] * torch.tensor([1e-4, 1e-2])
    p = method(y, torch.full((1, 1, 1), 1e-3, dtype=torch.float64))
    assert (p != 0).any(1).tolist() == [[True, False, True]]
    scaled = method(y * 2.0**-300, torch.full((1, 1, 1), 1e-3 * 2.0**-300, dtype=torch.float64))
    assert torch.allclose(scaled, p, atol=1e-12)


@each_method
def test_a_floor_whose_square_is_no_number_is_a_zero_column(method):
    y, floor = normal(torch.Generator().manual_seed(13), 2, 60, 5), torch.zeros(2, 1, 5, dtype=torch.float64)
    floor[0, 0, 2] = 1e200
    p = method(y, floor)
    assert (p == 0).all(1).nonzero().tolist() == [[0, 2]]
    assert (p[:1, :, [0, 1, 3, 4]] - method(y[:1, :, [0, 1, 3, 4]])).abs().max() <= 1e-13


def test_easy_matrices_take_one_pass_and_hard_ones_few(monkeypatch):
    taken, gram = [], cholesky._gram
    monkeypatch.setattr(cholesky, "_gram", lambda *args: taken.append(args) or gram(*args))

    def passes(condition: float) -> int:
        taken.clear()
        cholesky_qr(conditioned(torch.Generator().manual_seed(9), condition).float())
        return len(taken)

    assert [passes(c) for c in (1.0, 4.0)] == [1, 1]
    assert passes(100.0) == 2
    assert max(passes(c) for c in (1e4, 1e6, 1e8)) <= 4


@pytest.mark.parametrize("floor", [None, 1e-3, "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fixed_number_of_passes_reads_nothing_back(dtype, floor):
    """Fake tensors have no values: any branch on one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = torch.empty(2, 40, 8, dtype=dtype)
        floor = torch.empty(2, 1, 1) if floor == "lengths" else floor
        assert fixed(y, floor).shape == y.shape
        with pytest.raises(Exception, match=r"_local_scalar_dense|data-dependent"):
            cholesky_qr(y, floor)


@pytest.mark.parametrize(("dtype", "r", "error"), [(torch.float32, 192, 3e-7), (torch.float64, 96, 0)])
def test_what_nobody_judges_again_is_zero_rather_than_skew(dtype, r, error):
    """r / 8 columns, each copied about eight times in any order: more suspects than fixed rounds clear one by one."""
    g = torch.Generator().manual_seed(12)
    base = normal(g, 4, r, r // 8)
    y = torch.stack([matrix[:, torch.randint(0, r // 8, (r,), generator=g)] for matrix in base])
    y = (y + error * normal(g, 4, r, r)).to(dtype)
    with no_host_sync():
        p = cholesky_qr(y)
    for matrix in p:
        kept = matrix[:, (matrix != 0).any(0)].double()
        assert kept.shape[1] == r // 8
        assert (kept.mT @ kept - torch.eye(r // 8)).abs().max() <= tolerance(y)


@each_method
def test_no_global_random_state_and_the_same_bits_again(method):
    y = normal(torch.Generator().manual_seed(10), 2, 60, 8).float()
    state = torch.get_rng_state()
    first = method(y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    assert torch.equal(method(y), first)
    torch.set_rng_state(state)


@each_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_and_stays_in_its_matrix(method, bad):
    y = normal(torch.Generator().manual_seed(12), 2, 60, 8).float()
    alone = method(y[1:])
    y[0, 3, 4] = bad
    p = method(y)
    assert not p[0].isfinite().all() or not p[0].any()
    assert (p[1] - alone[0]).abs().max() <= 2e-6


@each_method
@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    r=st.integers(1, 12),
    rank=st.integers(0, 12),
    exponents=st.lists(st.integers(-6, 6), min_size=12, max_size=12),
    copies=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=4),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_matrix(method, m, r, rank, exponents, copies, seed, dtype):
    """Low rank, copied columns, columns of any size: finite, orthonormal, and every column of Y in the span of P."""
    g = torch.Generator().manual_seed(seed)
    y = normal(g, 2, m, max(rank, 1)) @ normal(g, 2, max(rank, 1), r) if rank < r else normal(g, 2, m, r)
    for a, b in copies:
        y[0, :, a % r] = y[0, :, b % r]
    y = (y * 10.0 ** torch.tensor(exponents[:r], dtype=torch.float64)).to(dtype)
    if rank == 0:
        y[1] = 0
    p = method(y)
    assert p.isfinite().all()
    eps = torch.finfo(dtype).eps
    assert max(skew(matrix) for matrix in p) <= tolerance(y)
    assert (p != 0).any(1).sum(1).max() <= min(m, r)
    assert rank > 0 or not p[1].any()
    for matrix, columns in zip(p.double(), y.double(), strict=True):
        unit = columns / columns.norm(dim=0).clamp(min=1e-300)
        kept = unit[:, (matrix != 0).any(0)]
        # A column left out is a combination of kept ones, to rounding times the size of its coefficients.
        size = 1 + torch.linalg.lstsq(kept, unit, driver="gelsd").solution.norm(dim=0) if kept.shape[1] else 1
        assert ((unit - matrix @ (matrix.mT @ unit)).norm(dim=0) <= 64 * eps * size).all()
