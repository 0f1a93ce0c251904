"""Factors of Gram matrices that may be singular: which columns depend on the ones before, and X for the others.

    G = YᵀY,   D = diag(1 / |Y_j|),   A = D G D with 1 + error on its diagonal;   X with XᵀAX = I,   Y D X orthonormal

G, A, X (b, r, r). Dependent columns of Y are zero columns of Y X; otherwise Y X is what it would be without them.
Columns are judged from left to right, and a dependent column is never used to judge a later one: what is left of it is
noise. This is done for all columns at once. A column no longer than its error, given *all* columns before it, is a
candidate. It is judged again against those columns before it that are not candidates, and is then rejected, or returned
for the next round. A column may be so close to the ones before it that this G cannot tell the rest of it from rounding.
It is then *deferred*: its column of Y X is Y_j less its projection on the columns before, not normalized, and the next
pass judges it by a new G.

Only `adaptive_factor` reads anything back to the host, and on a device a call on r x r matrices costs its launch. So
columns are brought to length 1 first, after which nothing depends on lengths; a column that is set aside is one of
(1 + error) I; errors stay squared from pass to pass; one product computes all weighted sums of X; and the number of
rounds is fixed.
May import torch, `linalg.columns`, `linalg.gram`, `linalg.host_sync` and `linalg.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthoshard.linalg.columns import VANISHING, relative_noise
from orthoshard.linalg.gram import APPLIED, MAX_ORTHOGONALITY_ERROR, inverse_factor
from orthoshard.linalg.host_sync import device_type, host_numbers
from orthoshard.linalg.scale import ORDINARY

# Rounds of candidates, two factorizations each, the most expensive calls here. Of 230 float32 matrices at the edge of
# rounding (low rank, copies, lengths from 1 to 1e6; r from 24 to 192) two lost a direction that no other column showed,
# and none with the floor that rules give. With three closing rounds none did, with one round everywhere 11. Float64 has
# no wider G and needs more. See docs/log.md.
ROUNDS = 2
CLOSING_ROUNDS = {torch.float32: 2, torch.float64: 6}
# After a float64 G of a narrower Y no other G follows: with two rounds one of the cases lost two directions of 24.
WIDE_ROUNDS = 3

LEAST = 8  # in errors of A: a smaller square cannot be told from rounding
FIXED = 2  # from `adaptive_factor`: this G cannot tell, so the fixed passes begin anew


class Unit(NamedTuple):
    """A Gram matrix in the form in which it is judged. All in float64."""

    A: Tensor  # (b, r, r); a column that is zero, or noise, is one of ``ridge``
    ridge: Tensor  # (b, r, r): (1 + error) I; the error of A is its own rounding and Cholesky's
    lengths: Tensor  # (b, r): 1 / |Y_j|, or 0
    noise: Tensor  # (b, 1, r): the squared errors of the columns of Y D
    least: Tensor  # (b, 1, 1): a smaller square cannot be told from rounding
    eye: Tensor  # (r, r)


def first_factor(
    gram: Tensor, floor: Tensor, share: bool, data: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do `next_factor` for a Y whose columns are off by rounding from ``data``, or by more. ``floor`` (b, 1, 1) or
    (b, 1, r), in float64: the square of that, or (``share``) of its share of the longest column, see `VANISHING`."""
    noise, _ = _squared_noise(gram, floor, share, data)
    return next_factor(gram, noise, dtype)


def adaptive_factor(
    gram: Tensor, floor: Tensor, share: bool, data: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do `first_factor` for a float64 G of a narrower Y, if the host may read.

    Returns D X (b, r, r) and, on the CPU, how many passes each matrix needs after this one (b,): 0, 1, or `FIXED`.
    For most batches, whose columns are all sound, it takes one factorization and the host reads once; at most it reads
    three times for the whole batch.
    """
    noise, longest = _squared_noise(gram, floor, share, data)
    unit = _unit(gram, noise)
    x = inverse_factor(unit.A, unit.eye)
    passes = _passes_after(unit, x, longest, dtype)
    if FIXED in passes:
        weights = _weights(unit)
        _, x = _settled(unit, weights, _sound(x, weights), WIDE_ROUNDS, look=True)
        passes = _passes_after(unit, x, longest, dtype)
    return (x * unit.lengths[:, :, None]).to(dtype), torch.tensor(passes, device="meta" if gram.is_meta else "cpu")


def _passes_after(unit: Unit, x: Tensor, longest: Tensor, dtype: torch.dtype) -> list[int]:
    """Return how many passes each matrix needs after one by this X, from one read of four numbers for each."""
    squares = x.square()
    growth = squares.sum(1).amax(1)
    noise = torch.bmm(unit.noise, squares).amax((1, 2))
    numbers = torch.stack([growth, noise, unit.least[:, 0, 0], longest[:, 0, 0]], 1)
    return [_passes(row, x.shape[1], dtype) for row in host_numbers(numbers, ordinary=(1.0, 0.0, 0.0, 1.0))]


def _passes(numbers: Sequence[float], r: int, dtype: torch.dtype) -> int:
    """Return how many passes one matrix needs after this, from: the longest column of X, squared, by which rounding of
    unit columns grows; the largest squared error of a column of Y D X; what `Unit` calls least; and the longest column
    of Y, squared. NaN gives `FIXED`."""
    growth, noise, least, longest = numbers
    eps, narrow = torch.finfo(torch.float64).eps, torch.finfo(dtype).eps
    low, high = ORDINARY  # beyond these, Y's dtype has no room for the range of X's columns
    sound = noise < 1 and growth * least < 1  # as `_sound` judges, of all columns
    if not (sound and growth * eps * 4 * (1 + math.sqrt(r)) < 1 and (low**2 < longest < high**2 or longest == 0)):
        return FIXED
    return 0 if growth * eps + APPLIED * narrow * math.sqrt(growth) <= MAX_ORTHOGONALITY_ERROR * narrow else 1


def _squared_noise(gram: Tensor, floor: Tensor, share: bool, data: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the squared errors (b, 1, r) of the columns of Y, and the square of the longest (b, 1, 1), in float64."""
    squares = gram.diagonal(dim1=1, dim2=2).double()[:, None]
    longest = squares.amax(2, keepdim=True)
    rounding = squares * relative_noise(data) ** 2
    if share:  # of at least `VANISHING`, so that a shorter column is zero anyway
        return torch.maximum(rounding, longest * floor), longest
    vanishing = longest * VANISHING**2
    return torch.maximum(torch.where(squares > vanishing, rounding, vanishing), floor), longest


def next_factor(gram: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return D X (b, r, r), and the squared errors (b, 1, r) of the columns of Y D X, for a G that may be singular.

    ``noise`` (b, 1, r): the squared errors of the columns of Y, in float64; those returned are too.
    """
    unit = _unit(gram, noise)
    accepted, x = _accepted(unit, ROUNDS)
    within, rest, blur = _projected(unit, x)
    deferred = ~(accepted[:, None] | (torch.maximum(rest, unit.least) <= blur))
    x = torch.where(deferred, unit.eye - within, x)
    return (x * unit.lengths[:, :, None]).to(dtype), torch.bmm(unit.noise, x.square())


def closing_factor(gram: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    """Return D X as from `next_factor`, if no later pass judges columns again: open columns are zero. If they
    stayed, the last pass would bring them to length 1 without making them orthogonal to the others. (PᵀP - I
    had entries up to 9 then.)"""
    unit = _unit(gram, noise)
    return ((_accepted(unit, CLOSING_ROUNDS[gram.dtype])[1] * unit.lengths[:, :, None]).to(dtype),)


def wide_factor(gram: Tensor, floor: Tensor, share: bool, data: torch.dtype, dtype: torch.dtype) -> tuple[Tensor]:
    """Do `adaptive_factor` if the host may not read: all rounds for all. What it accepts needs one last pass."""
    noise, _ = _squared_noise(gram, floor, share, data)
    unit = _unit(gram, noise)
    return ((_accepted(unit, WIDE_ROUNDS)[1] * unit.lengths[:, :, None]).to(dtype),)


def last_factor(gram: Tensor) -> tuple[Tensor]:
    """Return X for the G of a Y that is nearly orthonormal, except for its zero columns. Changes G."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal == 0)
    # cuBLAS solves float32 triangles in TF32 if torch's setting allows it: P'P - I was 5e-5 then (an H100)
    wide = gram if device_type(gram) == "cpu" else gram.double()
    return (inverse_factor(wide, _eye(wide)).to(gram.dtype),)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _unit(gram: Tensor, noise: Tensor) -> Unit:
    eps = torch.finfo(gram.dtype).eps
    gram = gram.double()
    eye = _eye(gram)
    squares = gram.diagonal(dim1=1, dim2=2)
    lengths = squares.rsqrt().masked_fill_(squares <= noise[:, 0], 0)  # NaN counts as live and shows in the result
    A = gram * (lengths[:, :, None] * lengths[:, None, :])
    least = LEAST * 4 * eps * torch.linalg.vector_norm(A, dim=(1, 2), keepdim=True)
    ridge = torch.addcmul(eye, eye, least, value=1 / LEAST)
    A.diagonal(dim1=1, dim2=2).copy_(ridge.diagonal(dim1=1, dim2=2))
    return Unit(A, ridge, lengths, noise * lengths.square()[:, None], least, eye)


def _accepted(unit: Unit, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the columns (b, r) that this many rounds accept, and X for them, zero for the others."""
    weights = _weights(unit)
    return _settled(unit, weights, _sound(inverse_factor(unit.A, unit.eye), weights), rounds)


def _settled(unit: Unit, weights: Tensor, accepted: Tensor, rounds: int, look: bool = False) -> tuple[Tensor, Tensor]:
    """Return the same, from the columns that the first round ``accepted``. Each round judges the candidates again,
    without those that the round before rejected. ``look``: ask the device, once, whether other rounds are needed."""
    x = _inverse(unit, accepted)
    for number in range(1, rounds):
        _, rest, blur = _projected(unit, x)
        kept = accepted | (rest > torch.maximum(unit.least, blur))[:, 0]
        if look and number == 1 and bool((kept == accepted).all()):
            break
        accepted = kept & _sound(inverse_factor(_among(unit, kept), unit.eye), weights)
        x = _inverse(unit, accepted)
    return accepted, x


def _weights(unit: Unit) -> Tensor:
    """Return the weights of X's squares in `_sound`, (b, 2, r)."""
    return torch.cat([unit.noise, unit.least.expand_as(unit.noise)], 1)


def _sound(x: Tensor, weights: Tensor) -> Tensor:
    """Return which columns (b, r) are longer than their error and can be told from rounding; none if X is NaN."""
    return (torch.bmm(weights, x.square()) < 1).all(1)


def _among(unit: Unit, columns: Tensor) -> Tensor:
    """Return A with all but these ``columns`` (b, r) set aside."""
    return torch.where(columns[:, :, None] & columns[:, None, :], unit.A, unit.ridge)


def _inverse(unit: Unit, accepted: Tensor) -> Tensor:
    """Return X of columns that are sound, so that Cholesky cannot fail; zero for the others."""
    return inverse_factor(_among(unit, accepted), unit.eye, definite=True) * accepted[:, None, :]


def _projected(unit: Unit, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each column of Y D: the coefficients (b, r, r) of its projection on the columns of Y D X before it;
    the square of what remains, (b, 1, r); and the squared error of that, (b, 1, r)."""
    onto = torch.triu(torch.bmm(x.mT, unit.A), diagonal=1)
    within = torch.bmm(x, onto)
    rest = 1 - onto.square().sum(1, keepdim=True)
    return within, rest, torch.baddbmm(unit.noise, unit.noise, within.square())
