"""What kernels share: numbers that the host or the device knows, one product of tiles, rounding, random bits.

Kernels compute in a *wide* dtype T: float64 for float64 tensors, float32 for all others. May import torch's dtypes and
Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when Triton was imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def number(value, at, T: tl.constexpr):
    """``value`` as T, or, where the host does not know it, what lies at ``at``. Written as a full tensor because a
    number that the host gives is a float64 on a device and a Python float in the interpreter."""
    if at is None:
        return tl.full((), value, T)
    else:  # noqa: RET505 both branches are compiled into one function, and Triton wants the other one named
        return tl.load(at).to(T)


@triton.jit
def add_dot(x, y, total, PRECISION: tl.constexpr):
    """total + x y, summed in the dtype of ``total``. The interpreter of Triton 3.7 multiplies the *bits* of bfloat16;
    float32 holds the same products exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def rounded(x, T: tl.constexpr, bits):
    """x in T. To bfloat16 by its own bits: to the nearest, ties to even, or, given ``bits`` (uniform, 16 of them), up
    with the probability of what would be cut off. Triton's interpreter would cut off always."""
    if x.dtype == T:
        return x
    elif T == tl.bfloat16:  # noqa: RET505, SIM300 as above; both are names of types
        u = x.to(tl.float32).to(tl.uint32, bitcast=True)
        if bits is None:
            u += 0x7FFF + ((u >> 16) & 1)
        else:
            u += bits
        cut = tl.where(x == x, u >> 16, 0x7FC0).to(tl.uint16)  # NaN stays NaN
        return cut.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(T)


@triton.jit
def random_bits(seed, matrix, rows, first, n, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN) uniform numbers of 16 bits for the entries (rows, first + 0..BN) of a matrix with n columns.

    They depend on the seed, the matrix's place in its list and the entry, not on the tiling. One call of Philox
    (Salmon et al., SC 2011) yields 128 bits, eight numbers: one call for each entry would cost more than the memory.
    """
    eights = (first // 8 + tl.arange(0, BN // 8)).to(tl.int64)
    counter = rows[:, None].to(tl.int64) * tl.cdiv(n, 8) + eights[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, low * 0 + matrix.to(tl.uint32), low * 0)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BM, BN])
