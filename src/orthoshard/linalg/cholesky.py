"""Cholesky QR, in as many passes as the condition needs: for most matrices one, of two matrix products.

    G = PᵀP,   RᵀR = G,   P <- P R⁻¹                                     one pass; P = Y at first

Y, P (b, m, r), G (b, r, r).

The columns leave a pass orthonormal up to (rounding of G) · κ², κ = the condition of P with unit columns. So
 - κ below about 15, as in a settled power iteration: one pass, in float32 throughout;
 - κ up to about 1000: two such passes (Cholesky QR 2: Yamamoto et al., ETNA 44, 2015);
 - beyond, G is taken again, in float64 (mixed precision: Yamazaki, Tomov, Dongarra, SISC 37, 2015). The products of
   float32 entries are exact there, κ² counts against 1e-16, and what is left decides which columns are noise.
   One more pass in float32 removes what rounding in P R⁻¹ itself left over;
 - where Y is float64, or float64 is slow, there is no wider G: R is shifted (Fukaya et al., SISC 42, 2020), and columns
   too close to the earlier ones wait, projected, for the next pass: see `gram.careful_factor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.columns import Floor, column_noise, computing_dtype, near_one, over
from orthoshard.linalg.fixed import closing_factor, first_factor, first_factor_of_share, fixed_factor, last_factor
from orthoshard.linalg.gram import Factor, careful_factor, plain_factor, sound
from orthoshard.linalg.looking import holds, may_look
from orthoshard.linalg.products import thin
from orthoshard.linalg.scale import ORDINARY, largest, power_of_two
from orthoshard.linalg.small import Small, Work, answered, finished

# P is accepted when rounding predicts no entry of PᵀP - I above this many eps: 4e-6 in float32.
# Measured up to 1.6 times that, for shapes from (100, 16) to (16384, 48).
SKEW = 32
# An entry of PᵀP - I from rounding in the product P R⁻¹, in eps for each unit of ||R⁻¹e_j||; measured 0.2 to 0.3.
APPLIED = 0.3
# Far more than any input needs; it only keeps NaN from going round for ever.
MOST_PASSES = 12


def cholesky_qr(y: Tensor, floor: Floor = None) -> Tensor:
    """Orthonormal columns of ``y``: see `orthoshard.linalg.orthonormal`."""
    return finished(answered(cholesky_qr_work(y, floor), Small, Small.done))


def cholesky_qr_work(y: Tensor, floor: Floor = None) -> Work:
    """`cholesky_qr` that yields its steps on r x r matrices, where the host may not look. As many, then, for every y of
    its dtype, even an empty one; and none where it may."""
    computing = y.to(computing_dtype(y.dtype))
    if may_look(y):
        return _looking(computing, floor, y.dtype)
    (scale,) = yield Small(_scale, (largest(y).to(computing.dtype),))
    return (yield from _fixed(*over(computing, floor, scale), y.dtype))


def _scale(size: Tensor) -> tuple[Tensor]:
    return (power_of_two(size),)


def _looking(y: Tensor, floor: Floor, dtype: torch.dtype) -> Tensor:
    """``dtype``: that of the data, whose rounding is the noise."""
    if y.shape[2] == 0 or y.shape[0] == 0:
        return y.clone()
    gram = _gram(y, y.dtype)
    longest = _longest(gram)
    if not _squares_fit(longest):
        y, floor = near_one(y, floor)
        gram = _gram(y, y.dtype)
        longest = _longest(gram)
    # Columns are judged at size 1. It is G and R that are scaled, exactly, rather than Y, which is larger.
    scale = power_of_two(longest)
    gram = gram / scale.square()
    noise = _noise(gram, floor / scale if isinstance(floor, Tensor) else floor, dtype)
    factor = plain_factor(gram, noise)
    usable = sound(factor)
    done = usable & _orthonormal(factor, y.dtype)
    if holds(done.all()):
        return thin(y, factor.x / scale)
    if not bool(usable.any()):
        return _repeated(y / scale, noise, wide=True)
    # Each matrix goes its own way, so that one bad one costs the batch nothing.
    p = thin(y, torch.where(usable[:, None, None], factor.x / scale, 0))
    for again, wide in ((usable & ~done, False), (~usable, True)):
        if not bool(again.any()):
            continue
        start = y[again] / scale[again] if wide else p[again]
        error = noise[again] if wide else factor.noise[again]
        result = _repeated(start, error, wide)
        if bool(again.all()):
            return result
        p[again] = result
    return p


def _longest(gram: Tensor) -> Tensor:
    """The length of the longest column, (b, 1, 1)."""
    return gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].sqrt()


def _squares_fit(longest: Tensor) -> bool:
    """Whether columns of these lengths and far shorter ones have squares that are normal numbers."""
    low, high = ORDINARY
    return holds(((longest > low) & (longest < high)).all())


def _repeated(p: Tensor, noise: Tensor, wide: bool) -> Tensor:
    """Passes until every matrix of the batch is done; the first with a wide G on request."""
    for number in range(MOST_PASSES):
        gram = _gram(p, torch.float64 if wide and number == 0 else p.dtype)
        factor = plain_factor(gram, noise.to(gram.dtype))
        if not bool(sound(factor).all()):
            factor = careful_factor(gram, noise)
        p, noise = thin(p, factor.x.to(p.dtype)), factor.noise
        if bool(_orthonormal(factor, p.dtype).all()):
            break
    return p


def _fixed(p: Tensor, floor: Floor, dtype: torch.dtype) -> Work:
    """The passes that any input needs, without reading anything back to the host."""
    if p.shape[2] == 0:
        return p.clone()
    first, *others, last = _fixed_grams(p)
    gram = _gram(p, first)
    if isinstance(floor, Tensor):
        x, noise = yield Small(first_factor, (gram, floor.expand(-1, 1, p.shape[2])), (dtype, p.dtype))
    else:
        share = gram.new_full((gram.shape[0], 1, 1), floor or 0.0)
        x, noise = yield Small(first_factor_of_share, (gram, share), (dtype, p.dtype))
    for gram_dtype in others:
        p = thin(p, x)
        gram = _gram(p, gram_dtype)
        x, noise = yield Small(fixed_factor, (gram, noise), (p.dtype,))
    p = thin(p, x)
    gram = _gram(p, last)
    (x,) = yield Small(closing_factor, (gram, noise), (p.dtype,))
    p = thin(p, x)
    gram = _gram(p, p.dtype)
    (x,) = yield Small(last_factor, (gram,))
    return thin(p, x)


def _fixed_grams(p: Tensor) -> list[torch.dtype]:
    """The dtype of G in each careful pass: enough of them to reach the noise of p's dtype."""
    if p.dtype == torch.float64:
        return [torch.float64] * 3
    # Data-centre GPUs (compute capability x.0) have float64 units for all lanes, others for one in 32 or 64.
    if p.device.type == "cuda" and torch.cuda.get_device_capability(p.device)[1] != 0:
        return [torch.float32] * 4
    return [torch.float64, torch.float32]


def _noise(gram: Tensor, floor: Floor, dtype: torch.dtype) -> Tensor:
    return column_noise(gram.diagonal(dim1=1, dim2=2).sqrt(), floor, dtype)


def _orthonormal(factor: Factor, dtype: torch.dtype) -> Tensor:
    """Whether each Y X (b,) is as orthonormal as ``dtype`` allows, up to `SKEW`."""
    eps = torch.finfo(dtype).eps
    return factor.amplification * factor.error + APPLIED * eps * factor.amplification.sqrt() <= SKEW * eps


def _gram(p: Tensor, dtype: torch.dtype) -> Tensor:
    """PᵀP, (b, r, r), in ``dtype``."""
    if dtype == p.dtype:
        return thin(p.mT, p)
    if p.device.type != "cpu":
        wide = p.to(dtype)
        return torch.bmm(wide.mT, wide)
    b, m, r = p.shape
    gram = p.new_zeros(b, r, r, dtype=dtype)
    # Converted a piece at a time, which stays in the cache.
    rows = max(64, 2**17 // r)
    piece = p.new_empty(min(rows, m), r, dtype=dtype)
    for matrix, result in zip(p, gram, strict=True):
        for start in range(0, m, rows):
            wide = piece[: min(rows, m - start)].copy_(matrix[start : start + rows])
            result.addmm_(wide.mT, wide)
    return gram
