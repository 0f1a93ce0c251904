"""Factors of Gram matrices that may be singular: which columns depend on the ones before, and X for the others.

    G = YᵀY,   D = diag(1 / |Y_j|),   A = D G D with 1 + error on its diagonal;   X with XᵀAX = I,   Y D X orthonormal

G, A, X (b, r, r). Dependent columns of Y are zero columns of Y X, and Y X is otherwise what it would be without them.
Columns are judged from left to right, and a dependent one is never held against a later one: what is left of it is
noise. That is done for all at once. A column that is no longer than its error, given *all* before it, is a candidate;
it is judged again, against the columns before it that are none, and rejected, or given back for the next round. A
column so close to the ones before it that this G cannot tell what is left of it from rounding is *deferred*: its column
of Y X is Y_j less its projection on the columns before, not normalized, for the next pass to judge by a fresh G.

Nothing is read back to the host, and on a device a call on r x r costs its launch. So columns are brought to length 1
at first, after which nothing depends on lengths, and one that is set aside is a column of (1 + error) I; errors stay
squared, from pass to pass; one product weighs all that is asked of X; rounds are a fixed number.
May import torch, `linalg.columns`, `linalg.gram`, `linalg.host_sync` and `linalg.scale`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthoshard.linalg.columns import column_noise
from orthoshard.linalg.gram import APPLIED, MAX_ORTHOGONALITY_ERROR, inverse_factor
from orthoshard.linalg.host_sync import device_type, holds, to_host
from orthoshard.linalg.scale import ORDINARY, power_of_two

# Rounds of candidates, two factorizations each, the dearest calls here. Of 230 float32 matrices at the edge of rounding
# (low rank, copies, lengths from 1 to 1e6; r from 24 to 192) two lost a direction that no other column showed, none
# under the floor that rules give; with three closing rounds none, with one round everywhere 11. Float64 has no wider G
# and needs more. See docs/log.md.
ROUNDS = 2
CLOSING_ROUNDS = {torch.float32: 2, torch.float64: 6}
# With a G in float64 of narrower Y no other will follow: with two rounds one of the cases lost two directions of 24.
WIDE_ROUNDS = 3

FIXED = 2  # of `adaptive_factor`: this G cannot tell, and the fixed passes begin anew


class Unit(NamedTuple):
    """A Gram matrix as it is judged. All in float64."""

    A: Tensor  # (b, r, r); a column that is zero, or noise, is one of ``ridge``
    ridge: Tensor  # (b, r, r): (1 + error) I, error being that of A: its own rounding and Cholesky's
    lengths: Tensor  # (b, r): 1 / |Y_j|, or 0
    noise: Tensor  # (b, 1, r): the squared errors of the columns of Y D
    least: Tensor  # (b, 1, 1): a smaller square is not told from rounding
    eye: Tensor  # (r, r)


def first_factor(
    gram: Tensor, floor: Tensor, share: bool, data: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`next_factor` of a Y whose columns are off by ``floor`` (b, 1, 1) or (b, 1, r), or by rounding from ``data``
    where that is more. ``share``: the floor is one of the longest column."""
    return next_factor(gram, _squared_noise(gram, floor, share, data), dtype)


def adaptive_factor(
    gram: Tensor, floor: Tensor, share: bool, data: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `first_factor` for a G in float64 of narrower Y, where the host may look, so that rounds end when they have
    nothing more to settle: D X (b, r, r), and on the CPU how many passes each matrix needs after this one (b,): 0, 1,
    or `FIXED`.

    At most three reads for the whole batch; for most, whose columns are all sound, one factorization and one read.
    """
    unit, scale = _scaled_unit(gram, floor, share, data)
    x = inverse_factor(unit.A, unit.eye)
    weights = _weights(unit)
    accepted = _sound(x, weights)
    more = _passes_after(x, scale, gram.dtype, dtype)
    if holds(accepted.all() & ~more.any()):
        more = torch.zeros_like(more, device="meta" if more.is_meta else "cpu")
    else:
        _, x = _settled(unit, weights, accepted, WIDE_ROUNDS, look=True)
        more = to_host(_passes_after(x, scale, gram.dtype, dtype))
    return (x * (unit.lengths / scale[:, 0])[:, :, None]).to(dtype), more


def _passes_after(x: Tensor, scale: Tensor, gram: torch.dtype, computing: torch.dtype) -> Tensor:
    """How many passes (b,) each matrix needs after one by this X, of a G in the dtype ``gram``."""
    r = x.shape[1]
    growth = x.square().sum(1).amax(1)  # the longest column of X, squared: of the rounding of unit columns
    eps, narrow = torch.finfo(gram).eps, torch.finfo(computing).eps
    low, high = ORDINARY  # beyond, X has no room in Y's dtype for what its columns differ by
    usable = (growth * eps * 4 * (1 + math.sqrt(r)) < 1) & ((scale > low) & (scale < high))[:, 0, 0]
    once = usable & (growth * eps + APPLIED * narrow * growth.sqrt() <= MAX_ORTHOGONALITY_ERROR * narrow)
    return torch.where(once, 0, 1).masked_fill_(~usable, FIXED)


def _scaled_unit(gram: Tensor, floor: Tensor, share: bool, data: torch.dtype) -> tuple[Unit, Tensor]:
    """Columns are judged at size 1, over this power of two (b, 1, 1)."""
    scale = power_of_two(_lengths(gram).amax(1)[:, None, None])
    gram = gram / scale.square()
    return _unit(gram, _squared_noise(gram, floor if share else floor / scale, share, data)), scale


def _squared_noise(gram: Tensor, floor: Tensor, share: bool, data: torch.dtype) -> Tensor:
    """The squared errors (b, 1, r) of the columns of Y, in float64."""
    lengths = _lengths(gram)
    noise = column_noise(lengths, floor * lengths.amax(1)[:, None, None] if share else floor, data)
    return noise.double().square()[:, None]


def next_factor(gram: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """D X (b, r, r), and the squared errors (b, 1, r) of the columns of Y D X, for a G that may be singular.

    ``noise`` (b, 1, r), and what is returned of it: the squared errors of the columns of Y, in float64.
    """
    unit = _unit(gram, noise)
    accepted, x = _accepted(unit, ROUNDS)
    within, rest, blur = _projected(unit, x)
    deferred = ~(accepted[:, None] | (torch.maximum(rest, unit.least) <= blur))
    x = torch.where(deferred, unit.eye - within, x)
    return (x * unit.lengths[:, :, None]).to(dtype), torch.bmm(unit.noise, x.square())


def closing_factor(gram: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    """D X as from `next_factor`, where no further judgement will follow: what is open then is zero. Left in it would
    be brought to length 1 without being orthogonal to the others. (It was, and PᵀP - I had entries up to 9.)"""
    unit = _unit(gram, noise)
    return ((_accepted(unit, CLOSING_ROUNDS[gram.dtype])[1] * unit.lengths[:, :, None]).to(dtype),)


def wide_factor(gram: Tensor, floor: Tensor, share: bool, data: torch.dtype, dtype: torch.dtype) -> tuple[Tensor]:
    """As `adaptive_factor` where the host may not look: all rounds for all. What it accepts needs one last pass."""
    unit, scale = _scaled_unit(gram, floor, share, data)
    return ((_accepted(unit, WIDE_ROUNDS)[1] * (unit.lengths / scale[:, 0])[:, :, None]).to(dtype),)


def last_factor(gram: Tensor) -> tuple[Tensor]:
    """X for the G of a Y that is orthonormal, nearly, but for its zero columns. Changes G."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal == 0)
    # cuBLAS solves triangles of float32 in TF32 where torch's setting has it: P'P - I was 5e-5 then (an H100)
    wide = gram if device_type(gram) == "cpu" else gram.double()
    return (inverse_factor(wide, _eye(wide)).to(gram.dtype),)


def _lengths(gram: Tensor) -> Tensor:
    """The norms of the columns of Y, (b, r)."""
    return gram.diagonal(dim1=1, dim2=2).sqrt()


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _unit(gram: Tensor, noise: Tensor) -> Unit:
    eps = torch.finfo(gram.dtype).eps
    gram = gram.double()
    eye = _eye(gram)
    squares = gram.diagonal(dim1=1, dim2=2)
    lengths = squares.rsqrt().masked_fill_(squares <= noise[:, 0], 0)  # NaN counts as live and shows in the result
    A = gram * (lengths[:, :, None] * lengths[:, None, :])
    error = 4 * eps * torch.linalg.vector_norm(A, dim=(1, 2), keepdim=True)
    ridge = torch.addcmul(eye, eye, error)
    A.diagonal(dim1=1, dim2=2).copy_(ridge.diagonal(dim1=1, dim2=2))
    return Unit(A, ridge, lengths, noise * lengths.square()[:, None], 8 * error, eye)


def _accepted(unit: Unit, rounds: int) -> tuple[Tensor, Tensor]:
    """The columns (b, r) that so many rounds accept, and X of them, zero for the others."""
    weights = _weights(unit)
    return _settled(unit, weights, _sound(inverse_factor(unit.A, unit.eye), weights), rounds)


def _settled(unit: Unit, weights: Tensor, accepted: Tensor, rounds: int, look: bool = False) -> tuple[Tensor, Tensor]:
    """The same from the columns that the first round ``accepted``. Candidates that a round does not reject are judged
    by the next without those that it did. ``look``: ask the device whether another is needed."""
    x = _inverse(unit, accepted)
    for _ in range(1, rounds):
        _, rest, blur = _projected(unit, x)
        kept = accepted | (rest > torch.maximum(unit.least, blur))[:, 0]
        if look and bool((kept == accepted).all()):
            break
        accepted = kept & _sound(inverse_factor(_among(unit, kept), unit.eye), weights)
        x = _inverse(unit, accepted)
    return accepted, x


def _weights(unit: Unit) -> Tensor:
    """What X's squares are weighed by in `_sound`, (b, 2, r)."""
    return torch.cat([unit.noise, unit.least.expand_as(unit.noise)], 1)


def _sound(x: Tensor, weights: Tensor) -> Tensor:
    """Which columns (b, r) are longer than their error, and are told from rounding; none where X is NaN."""
    return (torch.bmm(weights, x.square()) < 1).all(1)


def _among(unit: Unit, columns: Tensor) -> Tensor:
    """A with all but these ``columns`` (b, r) set aside."""
    return torch.where(columns[:, :, None] & columns[:, None, :], unit.A, unit.ridge)


def _inverse(unit: Unit, accepted: Tensor) -> Tensor:
    """X of columns that are sound, so that Cholesky cannot fail; zero for the others."""
    return inverse_factor(_among(unit, accepted), unit.eye, definite=True) * accepted[:, None, :]


def _projected(unit: Unit, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column of Y D: the coefficients (b, r, r) of its projection on the columns of Y D X before it, the square
    of what that leaves, and the squared error of this, (b, 1, r)."""
    onto = torch.triu(torch.bmm(x.mT, unit.A), diagonal=1)
    within = torch.bmm(x, onto)
    rest = 1 - onto.square().sum(1, keepdim=True)
    return within, rest, torch.baddbmm(unit.noise, unit.noise, within.square())
