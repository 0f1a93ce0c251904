"""Cholesky QR: orthonormal columns of a batch, in as many passes as the condition needs; for most matrices one.

    G = PᵀP,   RᵀR = G,   P <- P R⁻¹                                     one pass; P = Y at first

Y, P (b, m, r), G (b, r, r).

 - P is what QR with R_jj > 0 would give, whatever the size of Y, from denormal to the largest number. It is in Y's
   dtype, or in float32 if Y is narrower: rounding P would undo its orthonormality.
 - Column j is zero if Y_j is within rounding of the columns before it. The other columns are then orthonormal, and the
   same as without column j. So a zero Y gives zero, and m < r gives at most m columns. Rounding is that of Y's dtype,
   and 16 roundings of each column in float32: see `columns`.
 - A noise floor, (b, 1, 1) or (b, 1, r), is the norm of the error of each column, if that is more than rounding; a
   number is a share of the longest column. Columns no longer than the floor, and directions that such errors could have
   made, are zero as well. So is a column shorter than about 2^-50 of the longest of its matrix.
 - Matrices of a batch do not affect each other.

The columns leave a pass orthonormal up to (rounding of G) · κ², κ = the condition of P with unit columns. So
 - κ below about 15, as in a settled power iteration, takes one pass, in float32 throughout;
 - κ up to about 1000 takes two such passes (Cholesky QR 2: Yamamoto et al., ETNA 44, 2015);
 - a larger κ, or a column that may be noise, takes the fixed passes. G is in float64 (mixed precision: Yamazaki,
   Tomov, Dongarra, SISC 37, 2015). There the products of float32 entries are exact, κ² counts against 1e-16, and what
   is left of a column decides whether it is noise. One more pass in float32 removes the rounding of P R⁻¹ itself.
   If Y is float64, or float64 is slow, there is no wider G: R is shifted (Fukaya et al., SISC 42, 2020), and columns
   too close to the earlier ones wait, projected, for the next pass: see `dependent`.
On a device with fast float64, G is in float64 at once. Its factors are made for the matrices of all updates in flight
together, and the host reads once which matrices need more passes: see `dependent.adaptive_factor`. (On an H100
(16, 2048, 512) took 2.6 ms, the fixed passes of that time 14.4.) If the host may not read, all take the fixed passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.columns import (
    LARGEST_FLOOR,
    VANISHING,
    NoiseFloor,
    column_noise,
    computing_dtype,
    near_one,
    over,
)
from orthoshard.linalg.cpu import wide_gram
from orthoshard.linalg.dependent import (
    FIXED,
    adaptive_factor,
    closing_factor,
    first_factor,
    last_factor,
    next_factor,
    wide_factor,
)
from orthoshard.linalg.gram import plain_factor
from orthoshard.linalg.host_sync import all_zero, holds, host_may_read, sync_is_free
from orthoshard.linalg.products import thin_matmul
from orthoshard.linalg.scale import ORDINARY, largest, power_of_two
from orthoshard.linalg.small import BatchedCall, Work, answered, finished

# Compute capabilities of GPUs with a float64 unit for every second lane (P100, V100, A100, H100, B200). Others, such as
# B300 (10.3) and RTX 50 (12.0), have one for 32 or 64 lanes (CUDA C++ Programming Guide, "Arithmetic Instructions").
FLOAT64_GPUS = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def cholesky_qr(y: Tensor, floor: NoiseFloor = None) -> Tensor:
    """Return the orthonormal columns of ``y`` (b, m, r)."""
    return _finished(cholesky_qr_work(y, floor))


def cholesky_qr_work(y: Tensor, floor: NoiseFloor = None) -> Work:
    """Do `cholesky_qr` as a generator that yields its steps on r x r matrices, wherever the host reads nothing. It then
    yields equally many for every y of one dtype, even an empty one; it yields none if it reads flags."""
    computing = y.to(computing_dtype(y.dtype))
    if sync_is_free(y):
        return _adaptive(computing, floor, y.dtype)
    if host_may_read() and _gram_dtypes(computing)[0] != computing.dtype:
        return (yield from _adaptive_on_device(computing, floor, y.dtype))
    return (yield from _all_passes(computing, floor, y.dtype))


def _all_passes(y: Tensor, floor: NoiseFloor, dtype: torch.dtype) -> Work:
    (scale,) = yield BatchedCall(_scale, (largest(y).to(y.dtype),))
    return (yield from _fixed(*over(y, floor, scale), dtype))


def _finished(work: Work) -> Tensor:
    return finished(answered(work, BatchedCall, BatchedCall.done))


def _scale(size: Tensor) -> tuple[Tensor]:
    return (power_of_two(size),)


def _adaptive(y: Tensor, floor: NoiseFloor, dtype: torch.dtype) -> Tensor:
    """Take as many passes as each matrix needs, reading flags. ``dtype``: that of the data,
    whose rounding is the noise."""
    if y.shape[2] == 0 or y.shape[0] == 0:
        return y.clone()
    gram = _gram(y, y.dtype)
    if not _squares_fit(_longest(gram)):
        y, floor = near_one(y, floor)
        gram = _gram(y, y.dtype)
    # Columns are judged at size 1. G and R are scaled, exactly, rather than Y, which is larger.
    scale = power_of_two(_longest(gram))
    gram = gram / scale.square()
    noise = column_noise(
        gram.diagonal(dim1=1, dim2=2).sqrt(), floor / scale if isinstance(floor, Tensor) else floor, dtype
    )
    x, once, twice = plain_factor(gram, noise)
    if holds(once.all()):
        return thin_matmul(y, x / scale)
    # Each matrix is treated by itself, so that a bad one costs the others nothing.
    p = thin_matmul(y, torch.where((once | twice)[:, None, None], x / scale, 0))
    if bool(twice.any()):
        p[twice] = _finished(_last_pass(p[twice]))
    hard = ~(once | twice)
    if bool(hard.any()):
        share = floor[hard] if isinstance(floor, Tensor) else floor
        p[hard] = _finished(_fixed(*over(y[hard], share, scale[hard]), dtype))
    return p


def _adaptive_on_device(y: Tensor, floor: NoiseFloor, dtype: torch.dtype) -> Work:
    """Do the same on a device that the host may read: once for all matrices whose factors are made together."""
    if y.shape[2] == 0:
        return y.clone()
    gram = _gram(y, torch.float64)
    share, floors = _floors(floor, gram)
    x, passes = yield BatchedCall(adaptive_factor, (gram, floors), (share, dtype, y.dtype))
    p = thin_matmul(y, x)
    if not all_zero(passes):  # each matrix is treated by itself, so that a bad one costs the others nothing
        again, anew = ((passes == number).nonzero()[:, 0].to(y.device) for number in (1, FIXED))
        if len(again):
            p[again] = _finished(_last_pass(p[again]))
        if len(anew):
            p[anew] = _finished(_all_passes(y[anew], floor[anew] if isinstance(floor, Tensor) else floor, dtype))
    return p


def _floors(floor: NoiseFloor, gram: Tensor) -> tuple[bool, Tensor]:
    """Return whether the floor is a share of the longest column, and its square as a tensor in float64. A share below
    `VANISHING` counts as none."""
    if isinstance(floor, Tensor):
        return False, floor.double().clamp(max=LARGEST_FLOOR).square()
    number = min(floor or 0.0, LARGEST_FLOOR)
    share = number >= VANISHING
    square = number**2 if share else 0.0
    return share, gram.new_full((gram.shape[0], 1, 1), square, dtype=torch.float64)


def _longest(gram: Tensor) -> Tensor:
    """Return the length of the longest column, (b, 1, 1)."""
    return gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].sqrt()


def _squares_fit(longest: Tensor) -> bool:
    """Return whether columns of these lengths, and much shorter ones, have squares that are normal numbers."""
    low, high = ORDINARY
    return holds(((longest > low) & (longest < high)).all())


def _fixed(p: Tensor, floor: NoiseFloor, dtype: torch.dtype) -> Work:
    """Take the passes that any input needs, without reading anything back to the host."""
    if p.shape[2] == 0:
        return p.clone()
    first, *others, last = _gram_dtypes(p)
    gram = _gram(p, first)
    share, floors = _floors(floor, gram)
    if first != p.dtype:
        (x,) = yield BatchedCall(wide_factor, (gram, floors), (share, dtype, p.dtype))
        return (yield from _last_pass(thin_matmul(p, x)))
    x, noise = yield BatchedCall(first_factor, (gram, floors), (share, dtype, p.dtype))
    for gram_dtype in others:
        p = thin_matmul(p, x)
        x, noise = yield BatchedCall(next_factor, (_gram(p, gram_dtype), noise), (p.dtype,))
    p = thin_matmul(p, x)
    (x,) = yield BatchedCall(closing_factor, (_gram(p, last), noise), (p.dtype,))
    return (yield from _last_pass(thin_matmul(p, x)))


def _last_pass(p: Tensor) -> Work:
    """Take the last pass, of columns that are nearly orthonormal, or zero."""
    (x,) = yield BatchedCall(last_factor, (_gram(p, p.dtype),))
    return thin_matmul(p, x)


def _gram_dtypes(p: Tensor) -> list[torch.dtype]:
    """Return the dtype of G in each careful pass: enough passes to reach the noise of p's dtype."""
    if p.dtype == torch.float64:
        return [torch.float64] * 3
    if p.device.type == "cuda" and torch.cuda.get_device_capability(p.device) not in FLOAT64_GPUS:
        return [torch.float32] * 4
    return [torch.float64, torch.float32]


def _gram(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return PᵀP, (b, r, r), in ``dtype``."""
    if dtype == p.dtype:
        return thin_matmul(p.mT, p)
    if p.device.type == "cpu":
        return wide_gram(p, dtype)
    wide = p.to(dtype)
    return torch.bmm(wide.mT, wide)
