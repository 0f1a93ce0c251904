"""Parts: the matrices of one size in a parameter, as a layout cuts them. Pure, frozen.

A view reads a parameter as one matrix or as several blocks. Axes cut the dimensions along which the blocks lie, without
regard to the blocks. Of each block a rank holds the overlap with its slice of the dimension: any number of rows, or
none. In the order of the ranks, these pieces make up the block.

    rows 0 ..........................12       three blocks of 2, 6 and 4 rows, cut over two ranks:
    |  1 |       2      |    3     |          pieces 2 + 0, 4 + 2, 0 + 4
    |   rank 0      |   rank 1     |

If blocks of one height lie one after the other along the dimension that is stored first, and no cut goes through any of
them, they are a batch and the cut is a cut of the batch, as for experts: nothing has to be sent. This depends only on
lengths and axes, so every rank has the same parts in the same order.

A part of a tensor is a strided view of it; only interleaved blocks (several runs of more than one row) have to be
copied out and back. May import torch, `layout`, `owners`, `views` and `directions.request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

from torch import Tensor

from .directions.request import Dim
from .layout import Axis, Layout, local_slice, pieces
from .owners import split_counts
from .views import Block, MatrixView, Named

Dims = Sequence[Named | int]
BOTH: tuple[Named, Named] = ("rows", "columns")


@dataclass(frozen=True)
class Side:
    """The rows of a matrix, or its columns.

    whole  length of the dimension along which they lie
    axes   the axes that cut the dimension, in the order of cutting
    block  the entries of the dimension that belong to the matrix
    unit   number of neighbouring entries that are never cut apart
    """

    whole: int
    axes: tuple[Axis, ...]
    block: Block
    unit: int = 1

    @property
    def length(self) -> int:
        """The length of the whole matrix."""
        return self.block.length

    @cached_property
    def local_length(self) -> int:
        """The length of the piece on this rank."""
        first, last = self._bounds(len(self.axes))
        return self.block.before(last) - self.block.before(first)

    @property
    def first(self) -> int:
        """The offset of that piece in the whole matrix."""
        return self.block.before(self._bounds(len(self.axes))[0])

    def uncut(self) -> Side:
        """Return the same side of a matrix that is whole on this rank."""
        return Side(self.length, (), Block(0, self.length, self.length, 1))

    def pieces(self, depth: int) -> list[int]:
        """Return the lengths of the pieces into which the axis of this depth cuts the matrix."""
        first, last = self._bounds(depth)
        lengths = pieces((last - first) // self.unit, self.axes[depth].size)
        edges = [self.block.before(first + self.unit * edge) for edge in accumulate(lengths, initial=0)]
        return [after - before for before, after in pairwise(edges)]

    @cached_property
    def span(self) -> slice | None:
        """The entries as a slice of this rank's piece of the dimension; None if they are not evenly spaced."""
        if not self._runs:
            return slice(0, 0)
        (start, *_), (last, length, times) = self._runs[0], self._runs[-1]
        end = last + (times - 1) * self.block.period + length
        if end - start == self.local_length:
            return slice(start, end)
        return slice(start, end, self.block.period) if self.block.height == 1 else None

    def pick(self, x: Tensor, axis: int) -> Tensor:
        """Return the matrix's entries of this rank's piece of the dimension; a view if they are evenly spaced."""
        if self.span is not None:
            return x[(slice(None),) * axis + (self.span,)]
        value = x.new_empty(*x.shape[:axis], self.local_length, *x.shape[axis + 1 :])
        for stored, picked in self._pairs(x, axis, value):
            picked.copy_(stored)
        return value

    def put(self, x: Tensor, axis: int, value: Tensor) -> None:
        """Write the matrix's entries."""
        if self.span is not None:
            self.pick(x, axis).copy_(value)
            return
        for stored, picked in self._pairs(x, axis, value):
            stored.copy_(picked)

    def _pairs(self, x: Tensor, axis: int, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of ``x`` and of the picked entries, run by run. Indices would be tensors, which each step would
        have to copy to the device."""
        done = 0
        for start, length, times in self._runs:
            stored = x.narrow(axis, start, (times - 1) * self.block.period + length)
            stored = stored.unfold(axis, length, self.block.period).movedim(-1, axis + 1)
            yield stored, value.narrow(axis, done, times * length).unflatten(axis, (times, length))
            done += times * length

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """(start, length, times) of runs of entries in this rank's piece: ``times`` runs of ``length``, a period apart.
        They are the rest of a first group that a cut leaves, whole groups, and the rest of a last group."""
        first, last = self._bounds(len(self.axes))
        block, found = self.block, list[tuple[int, int, int]]()
        at, end = block.before(first), block.before(last)
        head = min(-at % block.height, end - at)
        rounds, tail = divmod(end - at - head, block.height)
        for length, times in ((head, 1), (block.height, rounds), (tail, 1)):
            if length and times:
                before, rest = divmod(at, block.height)
                found.append((block.start + before * block.period + rest - first, length, times))
                at += length * times
        return found

    def _bounds(self, depth: int) -> tuple[int, int]:
        """Return the slice of the dimension that the first ``depth`` axes leave to this rank, as (first, last + 1)."""
        offset, length = local_slice(self.whole // self.unit, self.axes[:depth])
        return offset * self.unit, (offset + length) * self.unit


@dataclass(frozen=True)
class Part:
    """Matrices of one size.

    dims             the parameter's dimensions of rows and of columns, counted after the batch dimensions
    replicas         the axes along which every rank holds the same values
    unreduced_axes   the replica axes along which gradients differ
    blocked          the side along which blocks lie; None if there is one matrix
    number           the index of this part's block
    blocks_as_batch  whether this part has all blocks, as a batch
    blocks_here      matrices of one parameter, or of one of its experts, on this rank
    some             (i, k): this part has the i-th of k slices of a parameter's experts
    """

    rows: Side
    columns: Side
    dims: tuple[tuple[int, ...], tuple[int, ...]]
    replicas: tuple[Axis, ...]
    unreduced_axes: tuple[Axis, ...]
    blocked: Named | None = None
    number: int = 0
    blocks_as_batch: bool = False
    blocks_here: int = 1
    some: tuple[int, int] = (0, 1)

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n) of the whole matrices."""
        return self.rows.length, self.columns.length

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that cut the matrices or replicate them."""
        return (*self.over("both"), *self.replicas)

    def count(self, experts: int) -> int:
        """Return the number of this part's matrices in a parameter that has this many experts on this rank."""
        some = self._of_batch(experts)
        return self.blocks_here * (some.stop - some.start)

    def _of_batch(self, experts: int) -> slice:
        i, k = self.some
        counts = split_counts(experts, k, 0)
        return slice(sum(counts[:i]), sum(counts[: i + 1]))

    def side(self, name: Named) -> Side:
        return self.rows if name == "rows" else self.columns

    def sides(self, over: Dim) -> list[Side]:
        return [self.rows, self.columns] if over == "both" else [self.side(over)]

    def over(self, over: Dim) -> tuple[Axis, ...]:
        """Return the axes that cut the rows, the columns or both."""
        return tuple(axis for side in self.sides(over) for axis in side.axes)

    def typical(self) -> Part:
        """Return the part at the origin of the mesh, each matrix cut as if it were alone: the same on every rank."""

        def origin(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            return tuple(replace(axis, coordinate=0) for axis in axes)

        def alone(side: Side) -> Side:
            return replace(side.uncut(), axes=origin(side.axes))

        rows, columns = alone(self.rows), alone(self.columns)
        return replace(
            self, rows=rows, columns=columns, replicas=origin(self.replicas), unreduced_axes=origin(self.unreduced_axes)
        )

    def view_of(self, tensor: Tensor, dims: Dims = BOTH) -> Tensor:
        """Return these matrices' entries of a tensor (B, ...), the local pieces of B parameters or of their state, as
        (b, ...). ``dims``: the dimensions that the tensor follows. The result is a view, unless `needs_copy`."""
        if dims == BOTH and self._plain:
            return tensor
        x, side, axis = self._spread(tensor, dims)
        return side.pick(x, axis) if side else x

    def write_back(self, tensor: Tensor, value: Tensor, dims: Dims = BOTH) -> None:
        """Write the entries that `view_of` reads."""
        x, side, axis = self._spread(tensor, dims)
        if side:
            side.put(x, axis, value)
        else:
            x.copy_(value)

    @cached_property
    def _plain(self) -> bool:
        """Whether the parameter is stored as one matrix or a stack, and this part has all of it."""
        return self.blocked is None and self.dims == ((0,), (1,)) and self.some == (0, 1)

    def needs_copy(self, dims: Dims = BOTH) -> bool:
        """Return whether `view_of` copies."""
        if self.blocked is None or self.blocks_as_batch or self.blocked not in dims:
            return False
        return self.side(self.blocked).span is None

    def _spread(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, Side | None, int]:
        """Return the tensor with one batch dimension and one for each of ``dims``. If one of them also has the entries
        of other blocks, return its side and its number as well."""
        x = self._joined(tensor[self._of_batch(len(tensor))], dims)
        for axis, dim in enumerate(dims, x.ndim - len(dims)):
            if isinstance(dim, int):
                x = x.narrow(axis, 0, dim)
        if self.blocked is None:
            return x, None, 0
        if self.blocked not in dims:
            return (_batched(x) if self.blocks_as_batch else x.select(1, self.number)), None, 0
        side, axis = self.side(self.blocked), 1 + list(dims).index(self.blocked)
        if not self.blocks_as_batch:
            return x, side, axis
        return _batched(x.unflatten(axis, (x.shape[axis] // side.length, side.length)).movedim(axis, 1)), None, 0

    def _joined(self, tensor: Tensor, dims: Dims) -> Tensor:
        """Return the tensor with the stored dimensions of each side joined into one. A tensor that follows both sides
        has its dimensions in the parameter's order."""
        stored = {"rows": self.dims[0], "columns": self.dims[1]}
        widths = [len(stored[dim]) if isinstance(dim, str) else 1 for dim in dims]
        if tuple(dims) == BOTH:
            tensor = tensor.permute(0, *(1 + dim for dim in (*self.dims[0], *self.dims[1])))
        if all(width == 1 for width in widths):
            return tensor
        sizes, shape = list(tensor.shape), list[int]()
        for width in reversed(widths):
            shape.insert(0, prod(sizes[-width:]))
            del sizes[-width:]
        return tensor.view(*sizes, *shape)


def _batched(x: Tensor) -> Tensor:
    """Return the tensor with its first two dimensions joined."""
    return x.view(x.shape[0] * x.shape[1], *x.shape[2:])


def parts_of(view: MatrixView, layout: Layout) -> tuple[Part, ...]:
    """Return the parts of a parameter. Raises ValueError if an axis cuts a dimension that the view joins with those
    before it. The message continues a sentence that starts with the parameter's name."""
    for side in BOTH:
        for dim in view.dims(side)[1:]:
            if layout.shard_axes[dim]:
                raise ValueError(
                    f"is cut along dimension {dim}, which the view {view.text!r} joins with those before it: shard "
                    f"it along dimension {view.dims(side)[0]} instead"
                )
    before = view.batch_dims
    dims = (tuple(dim - before for dim in view.rows), tuple(dim - before for dim in view.columns))
    if blocks_as_batch(view, layout):
        block = replace(view.blocks[0], start=0)
        here = layout.local[before] // block.length
        rows, columns = (
            Side(block.length, (), block) if side == view.blocked else _side(view, layout, side, None) for side in BOTH
        )
        return (
            Part(
                rows,
                columns,
                dims,
                layout.replicas,
                layout.unreduced_axes,
                view.blocked,
                blocks_as_batch=True,
                blocks_here=here,
            ),
        )
    parts = list[Part]()
    for number, block in enumerate(view.blocks or (None,)):
        rows, columns = (_side(view, layout, side, block if side == view.blocked else None) for side in BOTH)
        parts.append(Part(rows, columns, dims, layout.replicas, layout.unreduced_axes, view.blocked, number))
    return tuple(parts)


def _side(view: MatrixView, layout: Layout, side: Named, block: Block | None) -> Side:
    first, *others = view.dims(side)
    length = view.length(side)
    unit = prod(view.shape[dim] for dim in others)
    return Side(length, layout.shard_axes[first], block or Block(0, length, length, 1), unit)


def blocks_as_batch(view: MatrixView, layout: Layout) -> bool:
    """Return whether all blocks count as a batch: they have one height and lie one after the other along the dimension
    that is stored first, and no cut goes through any of them."""
    if view.blocked is None or view.dims(view.blocked) != (view.batch_dims,):
        return False
    height = view.blocks[0].height
    if any((block.height, block.times) != (height, 1) for block in view.blocks):
        return False
    lengths = {view.length(view.blocked)}
    for axis in layout.shard_axes[view.batch_dims]:
        lengths = {piece for length in lengths for piece in pieces(length, axis.size)}
        if any(length % height for length in lengths):
            return False
    return True


def state_layout(view: MatrixView, layout: Layout, dims: Dims) -> Layout:
    """Return the layout of a state tensor of the whole parameter whose dimensions follow ``dims``.

    State that follows both sides is placed as the parameter. State that does not follow the blocked side has one more
    dimension, which counts the blocks; blocks that share a dimension share its length.
    """
    if tuple(dims) == BOTH:
        return layout
    found: list[tuple[int | None, int]] = [(dim, view.shape[dim]) for dim in range(view.batch_dims)]
    if view.blocked and view.blocked not in dims:
        found.append((view.batch_dims if blocks_as_batch(view, layout) else None, len(view.blocks)))
    for dim in dims:
        found += [(d, view.shape[d]) for d in view.dims(dim)] if isinstance(dim, str) else [(None, dim)]
    if not found:
        return Layout((), ())
    return layout.derive([dim for dim, _ in found], tuple(length for _, length in found))
