"""Orthonormal columns of easy and hard matrices, also with each of torch's process-wide settings of TF32.

    |PᵀP - I|      largest entry, for columns that are not zero

May import torch and ``orthoshard``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from orthoshard.groups import group_rule
from orthoshard.lab.bench.selftest.cases import RULES, error, name_of, noise
from orthoshard.lab.bench.selftest.rows import Check
from orthoshard.linalg.cholesky import cholesky_qr
from orthoshard.optimizer import RuleOptimizer
from orthoshard.rules import MatrixRule

# Promised in docs/numerics.md, and checked on a CPU by tests/linalg.
SKEW = {torch.float32: 1e-5, torch.float64: 1e-14}
SIZES = ((2, 512, 128), (1, 512, 257), (2, 128, 128), (2, 64, 1), (3, 600, 300))


def orthonormal(device: torch.device) -> Iterator[Check]:
    for dtype in SKEW:
        for b, m, r in SIZES:
            for power in (0, 2, 5):
                measure = partial(_skew, partial(conditioned, power, b, m, r, device), dtype, r)
                yield Check(f"{b} x ({m}, {r}), condition 1e{power}, {name_of(dtype)}", measure)
        hard: dict[str, tuple[Callable[[], Tensor], int]] = {
            "24 of 64 columns copies": (partial(_copies, device), 40),
            "rank 6": (partial(_low_rank, device), 6),
            "zero": (lambda: torch.zeros(2, 512, 64, dtype=torch.float64, device=device), 0),
            "one column 1e12 times the others": (partial(_long, device), 64),
            "size 1e30": (lambda: conditioned(2, 2, 512, 64, device) * 1e30, 64),
            "size 1e-30": (lambda: conditioned(2, 2, 512, 64, device) * 1e-30, 64),
        }
        for what, (make, live) in hard.items():
            yield Check(f"{what}, {name_of(dtype)}", partial(_skew, make, dtype, live))
    yield Check("NaN stays in its matrix, float32", partial(_nan, device))


def tf32(device: torch.device) -> Iterator[Check]:
    """Yield checks under each process-wide setting of float32 products. Their limits do not depend on the setting."""
    for setting in ("highest", "high", "medium"):
        for power in (0, 2):
            make = partial(conditioned, power, 2, 2048, 128, device)
            yield Check(
                f'"{setting}": orthonormal columns, condition 1e{power}',
                partial(_under, setting, partial(_skew, make, torch.float32, 128)),
            )
        yield Check(f'"{setting}": DionTail beyond rank 8', partial(_under, setting, partial(_beyond, device)))
        for name in ("dion", "dion_tail", "muon, polar float32"):
            exact = {"matmul_precision": "float32"} if name != "muon, polar float32" else {}
            run = partial(error, {**RULES[name], **exact}, torch.float32, device)
            yield Check(f'"{setting}": {name}', partial(_under, setting, run))


def conditioned(power: int, b: int, m: int, r: int, device: torch.device) -> Tensor:
    """Return matrices (b, m, r) in float64 with singular values from 1 to 10^-power, in geometric progression."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn.to(device)).Q

    values = torch.logspace(0, -power, r, dtype=torch.float64, device=device)
    return (drawn(b, m, r) * values) @ drawn(b, r, r).mT


def _copies(device: torch.device) -> Tensor:
    y = conditioned(0, 2, 512, 64, device)
    y[:, :, 40:] = y[:, :, :24]
    return y


def _low_rank(device: torch.device) -> Tensor:
    return conditioned(0, 2, 512, 6, device) @ conditioned(0, 2, 64, 6, device).mT


def _long(device: torch.device) -> Tensor:
    y = conditioned(0, 2, 512, 64, device)
    y[:, :, 5] *= 1e12
    return y


def _skew(make: Callable[[], Tensor], dtype: torch.dtype, live: int) -> tuple[float, float]:
    return skew(cholesky_qr(make().to(dtype)), live), SKEW[dtype]


def skew(P: Tensor, live: int) -> float:
    """Return |PᵀP - I| of the columns that are not zero. Raises AssertionError if a matrix has not ``live`` of them."""
    wide = P.double()
    gram = wide.mT @ wide
    kept = gram.diagonal(dim1=1, dim2=2) > 0.5
    counts = kept.sum(1).tolist()
    if counts != [live] * len(counts):
        raise AssertionError(f"{counts} columns are not zero, but each matrix has {live} independent columns")
    return float((gram - torch.diag_embed(kept.double())).abs().max())


def _nan(device: torch.device) -> tuple[float, float]:
    y = conditioned(0, 2, 512, 64, device).float()
    y[1, :, 3] = float("nan")
    return skew(cholesky_qr(y)[:1], 64), SKEW[torch.float32]


def _beyond(device: torch.device) -> tuple[float, float]:
    """Return the share of an update's energy beyond the rank of all gradients so far, and its limit.

    This share can only be rounding; the limit is the square of what `cases.limit` allows as noise. With a noise floor
    that is too low, the rule would take rounding for a tail and scale it to full length.
    """
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.zeros(512, 768, device=device))
    U, V = (torch.randn(shape, generator=generator).to(device) for shape in ((512, 8), (8, 768)))
    optimizer = RuleOptimizer([weight], rule="dion_tail", rank_fraction=1 / 8, lr=1.0, weight_decay=0.0)
    before = weight.detach().clone()
    for _ in range(4):
        sizes = torch.rand(8, generator=generator).double().to(device)
        weight.grad = (U.double() * sizes @ V.double()).float()
        before = weight.detach().clone()
        optimizer.step()
    energies = torch.linalg.svdvals((weight.detach() - before).double()).square()
    rule = group_rule(optimizer.param_groups[0])
    assert isinstance(rule, MatrixRule)
    return float(energies[8:].sum() / energies.sum()), (4 * noise(rule, weight.dtype, device, (512, 768))) ** 2


def _under(setting: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        return measure()
    finally:
        torch.set_float32_matmul_precision(before)
