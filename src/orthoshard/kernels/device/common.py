"""What kernels share: numbers that the host or the device knows, the product of two tiles, rounding, random bits.

Kernels compute in a *wide* dtype T: float64 for float64 tensors, float32 for all others. May import torch's dtypes and
Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter, on the CPU: if TRITON_INTERPRET was 1 when Triton was imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LARGEST = tl.constexpr(0x7F7F0000)  # of bfloat16, as the bits of a float32

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def place(tiles_m, tiles_n, BM: tl.constexpr, BN: tl.constexpr):
    """Return for this program: the number of its matrix in the launch, and the rows and columns of its tile."""
    part = tl.program_id(0) % (tiles_m * tiles_n)
    rows = (part // tiles_n * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (part % tiles_n * BN + tl.arange(0, BN)).to(tl.int64)
    return tl.program_id(0) // (tiles_m * tiles_n), rows, columns


@triton.jit
def number(value, at, T: tl.constexpr):
    """Return ``value`` as T, or what lies at ``at`` if the host does not know the number. The result is a full tensor
    because a number from the host is a float64 on a device and a Python float in the interpreter."""
    return tl.full((), value, T) if at is None else tl.load(at).to(T)


@triton.jit
def own_number(value, at, step, matrix, T: tl.constexpr):
    """Return the same if each matrix may have its own number, ``step`` after the one before."""
    return tl.full((), value, T) if at is None else tl.load(at + matrix * step).to(T)


@triton.jit
def unless(skip, new, old):
    """Return ``new``, or ``old`` if the flag at ``skip`` is up; None: no flag."""
    if skip is not None:
        new = tl.where(tl.load(skip) == 0, new, old)
    return new


@triton.jit
def add_dot(x, y, total, PRECISION: tl.constexpr):
    """Return total + x y, summed in the dtype of ``total``. The interpreter of Triton 3.7 multiplies the *bits* of
    bfloat16; float32 holds the same products exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def rounded(x, T: tl.constexpr, bits):
    """Return x in T. To bfloat16 it rounds x's own bits to nearest, ties to even. Given ``bits`` (uniform, 16 of them)
    it rounds up with the probability of what would be cut off, except above the largest bfloat16, where it rounds to
    nearest. Triton's interpreter would always cut off."""
    if x.dtype == T:
        narrow = x
    elif tl.bfloat16 == T:
        u = x.to(tl.float32).to(tl.uint32, bitcast=True)
        up = 0x7FFF + ((u >> 16) & 1)
        if bits is not None:
            up = tl.where((u & 0x7FFFFFFF) < LARGEST, bits, up)
        cut = tl.where(x == x, (u + up) >> 16, 0x7FC0).to(tl.uint16)  # NaN stays NaN
        narrow = cut.to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(T)
    return narrow


@triton.jit
def random_bits(entry, rows, columns, inside, sRm, sRn, sCm, sCn):
    """Return the bits of `linalg.rounding` for a tile: 16 for each entry, mixed from R and C at its place. The table
    has the addresses of R and C after those of the weight. If one of their strides is 0, loads hit the cache."""
    R = tl.load(entry + 2).to(tl.pointer_type(tl.uint32))
    C = tl.load(entry + 3).to(tl.pointer_type(tl.uint32))
    x = tl.load(R + rows[:, None] * sRm + columns[None, :] * sRn, mask=inside, other=0)
    x ^= tl.load(C + rows[:, None] * sCm + columns[None, :] * sCn, mask=inside, other=0)
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x >> 16
