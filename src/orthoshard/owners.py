"""How matrices are dealt to the ranks of axes: each treated whole by one rank, its owner. Pure.

They go round: where one batch ends the next goes on, so that no rank gets every remainder. May import `layout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .layout import Axis


def split_counts(count: int, size: int, first: int) -> list[int]:
    """How many of ``count`` matrices each of ``size`` ranks gets; the remainder goes to ranks first, first + 1, ..."""
    base, rest = divmod(count, size)
    return [base + ((rank - first) % size < rest) for rank in range(size)]


def next_owner(first: int, axis: Axis) -> int:
    """Where the next axis goes on with what is dealt out to this rank along this one: ``first`` matrices were dealt out
    before, and so many of them to this rank. Were it ``first`` again, the same ranks would get every remainder."""
    return split_counts(first, axis.size, 0)[axis.coordinate]


def first_owner_within(first: int, owners: Sequence[Axis]) -> int:
    """About how many of ``first`` matrices are this replica's, where ``owners`` share them out."""
    for axis in owners:
        first = next_owner(first, axis)
    return first


def rank_on(axes: Sequence[Axis]) -> int:
    """The number of this rank among those of several axes, the last counting fastest; 0 of none."""
    number = 0
    for axis in axes:
        number = number * axis.size + axis.coordinate
    return number


def gather_order(shares: Sequence[int], axes: Sequence[Axis]) -> Iterator[tuple[Axis, Sequence[int]]]:
    """How what every rank has (``shares``, by `rank_on`) is brought together, axis by axis, the last one first: what
    the ranks on this rank's line along the axis have by then."""
    number = rank_on(axes)
    for axis in reversed(axes):
        number //= axis.size
        along = [shares[first : first + axis.size] for first in range(0, len(shares), axis.size)]
        yield axis, along[number]
        shares = [sum(line) for line in along]
