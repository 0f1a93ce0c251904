"""Steps on small matrices: several at once give what each gives alone, and generators pass on what is not theirs."""

from __future__ import annotations

import pytest
import torch
from cases import conditioned, normal
from torch import Tensor

from orthoshard.linalg.cholesky import cholesky_qr, cholesky_qr_work
from orthoshard.linalg.host_sync import no_host_sync
from orthoshard.linalg.small import BatchedCall, answered, at_once, finished, run_batched


def summed(x, y, sign=1):
    return x + sign * y, x.sum((1, 2))


def test_run_batched_is_each_alone():
    g = torch.Generator().manual_seed(0)
    steps = [BatchedCall(summed, (normal(g, b, 3, 3), normal(g, b, 3, 3)), (-1,)) for b in (2, 0, 1)]
    assert len({step.kind for step in steps}) == 1
    for step, results in zip(steps, run_batched(steps), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step.done(), results, strict=True))


def test_other_sizes_dtypes_and_options_are_another_kind():
    x = torch.zeros(2, 3, 3)
    step = BatchedCall(summed, (x, x))
    assert step.kind == BatchedCall(summed, (x[:1], x[:1])).kind
    others = [
        BatchedCall(summed, (x, x), (1,)),
        BatchedCall(summed, (x[:, :2], x)),
        BatchedCall(summed, (x, x.double())),
        BatchedCall(max, (x, x)),
    ]
    assert all(step.kind != other.kind for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orthonormalizations_side_by_side(dtype):
    """Of different numbers of rows and matrices, as their own; the steps are as many whatever is given."""
    g = torch.Generator().manual_seed(1)
    ys = [conditioned(g, 10.0).to(dtype), normal(g, 3, 40, 16).to(dtype), normal(g, 0, 50, 16).to(dtype)]
    ys[0] = ys[0][:, :, :16]
    with no_host_sync():
        expected = [cholesky_qr(y, 1e-3) for y in ys]
        works, results = [cholesky_qr_work(y, 1e-3) for y in ys], [None] * len(ys)
        while True:
            steps = []
            for number, work in enumerate(works):
                try:
                    steps.append(work.send(results[number]))
                except StopIteration as stop:
                    results[number] = stop.value
            if not steps:
                break
            assert len(steps) == len(works), "some took more steps than others"
            results = run_batched(steps)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    for p, q in zip(results, expected, strict=True):
        assert p.shape == q.shape
        assert not p.numel() or (p - q).abs().max() <= tolerance


def test_a_function_as_work():
    x = torch.ones(2, 3, 4)
    assert torch.equal(finished(at_once(torch.mul)(x, 3)), 3 * x)
    assert finished(at_once(torch.mul)(x[:0], 3)).shape == (0, 3, 4)


def test_what_is_not_answered_is_passed_on():
    def algorithm():
        first = yield 1
        second = yield "two"
        third = yield 3
        return first, second, third

    passed = answered(algorithm(), int, lambda number: -number)
    assert next(passed) == "two"
    with pytest.raises(StopIteration) as stop:
        passed.send("here")
    assert stop.value.value == (-1, "here", -3)
    with pytest.raises(AssertionError, match="without an answer"):
        finished(algorithm())


@pytest.mark.parametrize("count", [0, 2])
def test_work_on_no_matrices_has_the_dtype_of_its_results(count):
    """As all ranks must send alike, also one that owns nothing."""
    assert finished(at_once(Tensor.half)(torch.zeros(count, 3, 2))).dtype == torch.float16
