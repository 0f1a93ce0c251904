"""How float32 results become bfloat16 weights: to nearest, or stochastically.

    x, between its neighbours  lo <= x < hi  of the dtype:   hi with probability (x - lo) / (hi - lo), else lo

so that the mean of what is stored is x, and steps far below half a unit of the last place are not lost but taken
now and then (Gupta et al., arXiv 1502.02551, section 3). A number that bfloat16 holds stays as it is. The work is
done on the bits of x, because bfloat16 is the upper half of float32: the lower half and 16 random bits are added,
and the carry decides. Sign and magnitude are separate, so this is right for negative numbers as well, and for
denormal ones, whose bits are spaced evenly. NaN, infinities and what lies above the largest bfloat16 are rounded to
nearest, as nothing is above them.

The random bits are a hash of the entry's place in the whole parameter. So they do not depend on the sharding, the
device, or anything drawn before. An entry has the place j along its last dimension, and i along all others together:

    bits(i, j) = upper 16 of mix(R_i xor C_j),   R_i = hash(key, step, i),   C_j = hash(key, step, j) with another key

R and C are thin: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), 64 bits, of which 32 are kept. mix has to be done for
every entry: two multiplications and an xor-shift in 32 bits, the middle part of "lowbias32" (C. Wellons, 2018).
May import torch, `linalg.cpu` and `linalg.host_sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthoshard.linalg import cpu
from orthoshard.linalg.host_sync import sync_is_free

ROUNDINGS = ("nearest", "stochastic")
# Rounds a float32 tensor into a weight.
Rounding = Callable[[Tensor, Tensor], None]
Count = int | Tensor

LARGEST = float(torch.finfo(torch.bfloat16).max)
# Entries that are mixed at a time. On a CPU two buffers of int32 then stay in the second-level cache; elsewhere buffers
# of 16 bytes an entry stay small beside a model.
CHUNK = 2**16
CHUNK_ELSEWHERE = 2**23
# Entries that rules for many tensors at once copy to float32 at a time: 16 MB for each tensor that an entry has.
TOGETHER = 2**22


@dataclass(frozen=True, slots=True)
class Stochastic:
    """The rounding of one tensor: ``rows`` and ``columns`` are R and C, int32, expanded to the
    weight's shape by stride 0."""

    rows: Tensor
    columns: Tensor

    def __call__(self, weight: Tensor, wide: Tensor) -> None:
        """Round ``wide``, float32, into ``weight``, bfloat16. May overwrite ``wide``."""
        assert wide.dtype == torch.float32, wide.dtype
        assert weight.dtype == torch.bfloat16, weight.dtype
        tensors = [weight, wide, self.rows, self.columns]
        for pieces in cpu.pieces(tensors, CHUNK if weight.device.type == "cpu" else CHUNK_ELSEWHERE):
            _round(*pieces)


@dataclass(slots=True)
class Stretch:
    """Neighbouring parameters, or pieces of them, with so few entries that copies stay small.

    columns   weights, gradients and state, one list each
    rounding  one for each weight, or None
    numbers   the index of the parameter that each is, or is a piece of
    last      whether it is the last piece of its parameter
    """

    columns: list[list[Tensor]]
    rounding: list[Rounding] | None
    numbers: list[int]
    last: list[bool]


def stretches(columns: Sequence[Sequence[Tensor]], rounding: Sequence[Rounding] | None = None) -> Iterator[Stretch]:
    """Yield all parameters, in stretches of at most `TOGETHER` entries if that is possible."""
    stretch, entries = _empty(columns, rounding), 0
    for number, row in enumerate(zip(*columns, strict=True)):
        own = None if rounding is None else rounding[number]
        assert own is None or isinstance(own, Stochastic)
        places = [] if own is None else [own.rows, own.columns]
        pieces = list(cpu.pieces([*row, *places], TOGETHER))
        for i, piece in enumerate(pieces, 1):
            if stretch.numbers and entries + piece[0].numel() > TOGETHER:
                yield stretch
                stretch, entries = _empty(columns, rounding), 0
            for column, tensor in zip(stretch.columns, piece, strict=False):
                column.append(tensor)
            if stretch.rounding is not None:
                stretch.rounding.append(Stochastic(*piece[len(columns) :]))
            stretch.numbers.append(number)
            stretch.last.append(i == len(pieces))
            entries += piece[0].numel()
    if stretch.numbers:
        yield stretch


def _empty(columns: Sequence[Sequence[Tensor]], rounding: Sequence[Rounding] | None) -> Stretch:
    return Stretch([[] for _ in columns], None if rounding is None else [], [], [])


def wide_copies(columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return weights, gradients and state of some parameters as they are computed with: contiguous, in one dtype per
    parameter, float32 or the weight's if that is wider. Tensors that are so already are not copied."""
    wide = [torch.promote_types(weight.dtype, torch.float32) for weight in columns[0]]
    return [[x.to(dtype).contiguous() for x, dtype in zip(column, wide, strict=True)] for column in columns]


def write_back(tensors: Sequence[Tensor], copies: Sequence[Tensor], rounding: Sequence[Rounding] | None = None) -> None:
    """Write `wide_copies` back, rounded to nearest or by ``rounding``, one for each tensor."""
    for number, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        if rounding is not None:
            rounding[number](tensor, copy)
        elif copy is not tensor:
            tensor.copy_(copy)


def places(whole: Sequence[int], pieces: Sequence[tuple[int, int]], keys: Tensor, step: Count) -> tuple[Tensor, Tensor]:
    """Return R and C for the piece (offset, length) in each dimension of k parameters of shape
    ``whole``, expanded to (k, ...).

    ``keys`` (k,), int64, distinguish parameters, and ``step`` distinguishes steps: a number, or a 0-d tensor that the
    host does not know. Parameters of one shape are hashed together, because on a GPU only the number of calls matters.
    """
    index = torch.zeros((), dtype=torch.int64, device=keys.device)
    local = (len(keys), *(length for _, length in pieces))
    for dim, (offset, length) in enumerate(pieces[:-1]):
        along = torch.arange(offset, offset + length, device=keys.device)
        index = index.unsqueeze(-1) * whole[dim] + along
    rows = _hash(index, keys, step, 0)
    first, length = pieces[-1] if pieces else (0, 1)
    columns = _hash(torch.arange(first, first + length, device=keys.device), keys, step, 1)
    if not pieces:
        return rows, columns.squeeze(-1)
    columns = columns.view(len(keys), *(1 for _ in pieces[1:]), length)
    return rows.unsqueeze(-1).expand(local), columns.expand(local)


def _hash(index: Tensor, keys: Tensor, step: Count, stream: int) -> Tensor:
    """Return 32 bits for each index and key, (k, ...)."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=keys.device)
    start = _splitmix(_splitmix(keys + _signed(stream * GOLDEN)) + step.to(torch.int64) * _signed(GOLDEN))
    start = start.view(-1, *(1 for _ in index.shape))
    return (_splitmix(start + (index + 1) * _signed(GOLDEN)) >> 32).to(torch.int32)


GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2^64 over the golden ratio, odd


def _splitmix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift logically to the right; torch's shift keeps the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _round(weight: Tensor, wide: Tensor, rows: Tensor, columns: Tensor) -> None:
    x = torch.bitwise_xor(rows, columns).mul_(0x7FEB352D)
    spare = torch.bitwise_right_shift(x, 15).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(spare).mul_(_signed(0x846CA68B, 32))
    x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    if sync_is_free(wide):
        low, high = (float(end) for end in torch.aminmax(wide)) if wide.numel() else (0.0, 0.0)
        ordinary = None if low > -LARGEST and high < LARGEST else wide.abs() < LARGEST
    else:
        ordinary = wide.abs() < LARGEST
    x.add_(wide.view(torch.int32)).bitwise_right_shift_(16)
    rounded = x.to(torch.int16).view(torch.bfloat16)
    weight.copy_(rounded if ordinary is None else torch.where(ordinary, rounded, wide.to(torch.bfloat16)))
