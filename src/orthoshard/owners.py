"""How matrices are dealt to the ranks of axes. Each matrix has one owner, the rank that treats it whole. Pure.

Dealing is round-robin: each batch starts where the last one ended, so no rank gets every remainder. May import
`layout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .layout import Axis


def split_counts(count: int, size: int, first: int) -> list[int]:
    """Return how many of ``count`` matrices each of ``size`` ranks gets. The remainder goes to ranks ``first``,
    ``first`` + 1, ..."""
    base, rest = divmod(count, size)
    return [base + ((rank - first) % size < rest) for rank in range(size)]


def next_owner(first: int, axis: Axis) -> int:
    """Return where dealing starts along the next axis: ``first`` matrices were dealt along this axis before, and this
    many of them to this rank. With ``first`` itself, the same ranks would get every remainder."""
    return split_counts(first, axis.size, 0)[axis.coordinate]


def first_owner_within(first: int, owners: Sequence[Axis]) -> int:
    """Return roughly how many of ``first`` matrices belong to this replica, if they are dealt along ``owners``."""
    for axis in owners:
        first = next_owner(first, axis)
    return first


def rank_on(axes: Sequence[Axis]) -> int:
    """Return the number of this rank among the ranks of several axes, the last axis counting fastest; 0 for no axes."""
    number = 0
    for axis in axes:
        number = number * axis.size + axis.coordinate
    return number


def gather_order(shares: Sequence[int], axes: Sequence[Axis]) -> Iterator[tuple[Axis, Sequence[int]]]:
    """Yield the all-gathers that collect the ``shares`` of all ranks (indexed by `rank_on`), the last axis first: the
    axis, and what each rank on this rank's line along it holds by then."""
    number = rank_on(axes)
    for axis in reversed(axes):
        number //= axis.size
        along = [shares[first : first + axis.size] for first in range(0, len(shares), axis.size)]
        yield axis, along[number]
        shares = [sum(line) for line in along]
