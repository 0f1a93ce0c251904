"""One update of a batch of matrices: the direction, and everything around it.

    opened                state kept in 8 bits becomes numbers; it is encoded again at the end
    momentum, prepare     on this rank's pieces, with the state updated in place
    direction             on the local pieces, or dealt: whole matrices go to owners, and either U or its factors come
                          back, whichever is less;
                          replicas with equal gradients each do their part of the batch
    normalize, move       on the proposal, thin
    figures               if the step is recorded
    publish               if replicas keep only the state of their own matrices
    write, settle         the one write of the weights; error feedback, the basis, what a stage records afterwards

Directions and stages know nothing of this. May import torch, `linalg`, `directions`, `stages`, `rules`,
`slots`, `parts` and this room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..directions.proposal import FOLLOWS, Proposal
from ..directions.request import Sum
from ..directions.seen import Seen
from ..linalg.host_sync import device_type, sync_is_free
from ..linalg.products import multiply, multiply_add, resolved
from ..linalg.scale import scale_where_needed
from ..linalg.unit import keep_live
from ..parts import BOTH, Part
from ..rules.matrix import MatrixRule
from ..slots import EIGHT_BITS
from ..stages import Applied, Batch, Move, write
from .encoded import close, opened
from .gather import Task
from .transport import Follows, Transport

# Which sides the scales and the other tensors that a direction sees follow.
SCALES: dict[str, Follows] = {
    "rows": ("rows", "one"),
    "columns": ("one", "columns"),
    "size": ("one", "one"),
    "squares": ("rows", "one"),
    "gram": ("one", "one"),
}

# Records the figures of an update.
Recorder = Callable[[Seen, Proposal, Move, Transport], Task]


def update(
    rule: MatrixRule, batch: Batch, transport: Transport, dealt: bool = False, record: Recorder | None = None
) -> Task:
    """Take one step of ``batch``, in place. ``dealt``: the direction runs at owners, on whole matrices."""
    held = batch.state
    slots = rule.slots(batch.shape, batch.weights[0].dtype) if rule.state_dtype == EIGHT_BITS else {}
    batch = replace(batch, state=opened(held, slots, transport.part, batch.weights[0].dtype))
    state = batch.state
    precision = resolved(rule.direction.precision, device_type(state["momentum"]))
    seen, size = rule.momentum.look(batch, precision)
    # float64, because a sum over ranks of numbers near the largest float32 overflows float32
    size = yield from transport.to(Sum(size.double(), over="both", linear_in_gradient=True))
    seen.weights, seen.gram, seen.gram_side = batch.own, batch.gram, batch.gram_side
    seen.size = scale_where_needed(size, seen.N.dtype)
    for stage in rule.stages:
        seen = yield from transport.run(stage.prepare(seen, batch))
    proposal = yield from _propose(rule, seen, batch, transport, dealt, may_form=record is None)
    seen.copies.clear()
    for stage in rule.stages:
        yield from transport.run(stage.normalize(proposal, batch))
    rate, decay = rule.direction.split(rule.lr, rule.decay())
    move = Move(rate * rule.size(batch.product or batch.shape), decay, rule.lr)
    for stage in rule.stages:
        move = yield from transport.run(stage.move(move, proposal, batch))
    if record is not None:
        yield from record(seen, proposal, move, transport)
    if proposal.basis is not None and proposal.live is not None:
        keep_live(proposal.basis, proposal.live, state["Q"], batch.skip)
    taken = rule.momentum.taken(proposal, seen)
    applied, move = yield from _published(proposal, move, transport)
    _write(rule, batch, seen, applied, move, taken)
    rule.momentum.take_formed(proposal, seen, batch)
    for stage in rule.stages:
        yield from transport.run(stage.written(batch))
    yield from close(held, slots, state, transport)


def _write(rule: MatrixRule, batch: Batch, seen: Seen, applied: Applied, move: Move, taken: Any) -> None:
    settle = rule.momentum.settle(seen, batch)
    together = settle if len(batch.own) == len(batch.weights) else None
    product = None if taken is None else (batch.state["momentum"], taken)
    write(
        batch.weights, applied, move, taken=product, precision=seen.precision, rounding=batch.rounding,
        skip=batch.skip, settle=together,
    )  # fmt: skip
    if settle is not None and together is None:
        settle(slice(None))


def _propose(rule: MatrixRule, seen: Seen, batch: Batch, transport: Transport, dealt: bool, may_form: bool) -> Task:
    """Return the proposal of the whole batch, at every rank, sharded as the weights are.

    ``may_form``: U may come back formed. Figures need its factors, so it may not while a step is recorded.
    """
    if not transport.sharing:
        return (yield from _at_owners(rule, seen, batch, transport, dealt, may_form))
    inside, first, last, join = transport.split(seen.N.shape[0])
    state = {name: batch.state[name][first:last] for name in rule.direction.slots(batch.shape, seen.N.dtype)}
    part = replace(batch, state=state)
    its = seen.part(first, last)
    mine = yield from _at_owners(rule, its, part, inside, dealt, may_form)
    its.copies.clear()
    names, tensors = _travelling(mine)
    joined = yield from join(tensors)
    return _arrived(mine, names, joined, seen)


def _at_owners(rule: MatrixRule, seen: Seen, batch: Batch, transport: Transport, dealt: bool, may_form: bool) -> Task:
    direction, shape = rule.direction, batch.shape
    if not dealt or not transport.part.over("both"):
        return (yield from _proposed(rule, seen, batch.state, shape, transport))
    slots = direction.slots(shape, seen.N.dtype)
    sides = {name: _dims(slot.dims) for name, slot in slots.items()}
    moved: dict[str, tuple[Tensor, Follows]] = {"N": (seen.N, ("rows", "columns"))}
    for name, follows in SCALES.items():
        scale = getattr(seen, name)
        if scale is not None:
            moved[name] = (scale, follows)
    state = {f"state {name}": (batch.state[name], sides[name]) for name in slots}
    whole, undo = yield from transport.to_owners([*moved.values(), *state.values()])
    theirs = dict(zip([*moved, *state], whole, strict=True))
    seen_whole = Seen(precision=seen.precision, gram_side=seen.gram_side, **{name: theirs[name] for name in moved})
    state_whole = {name: theirs[f"state {name}"] for name in slots}
    found = yield from _proposed(rule, seen_whole, state_whole, shape, transport.whole())
    seen_whole.copies.clear()
    N = seen_whole.N
    del whole, theirs, seen_whole, state_whole  # large, and no longer needed
    feedback, dense = rule.momentum.error_feedback, dict[str, Tensor]()
    if may_form and _formed_is_less(found, sides, shape, transport.part, feedback):
        # one after the other, in the memory of N, which came here only for this update
        for name in ("full", "withheld") if feedback and found.captured is not None else ("full",):
            (dense[name],) = yield from undo([(_formed(found, name, N), ("rows", "columns"))])
        none = dict.fromkeys(("left", "right", "rows", "full", "orthonormal", "captured", "beyond"))
        found = replace(found, **none)
    del N
    names, tensors = _travelling(found)
    follows = [_follows(name, tensor, sides) for (name, *_), tensor in zip(names, tensors, strict=True)]
    back = yield from undo(list(zip(tensors, follows, strict=True)))
    return replace(_arrived(found, names, back, seen), **dense)


def _proposed(
    rule: MatrixRule, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...], transport: Transport
) -> Task:
    found = yield from transport.run(rule.direction.propose(seen, state, shape))
    if not isinstance(found, Proposal):
        raise TypeError(f"{type(rule.direction).__name__}.propose returned {found!r:.40}: let it return a Proposal")
    return found


def _formed(proposal: Proposal, name: str, N: Tensor) -> Tensor:
    """Return U of thin factors, or what rank r captured (``name``: "full" or "withheld"), in the memory of ``N`` if
    dtypes allow. U is formed first, because it may take N's values."""
    left, right, rows, full = proposal.left, proposal.right, proposal.rows, proposal.full
    assert left is not None
    assert right is not None
    wide = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(wide), right.to(wide)
    out = N if N.dtype == wide else torch.empty_like(N, dtype=wide)
    if name == "withheld":
        assert proposal.captured is not None
        if left.shape[1] <= right.shape[1]:
            left = (left * proposal.captured).to(wide)
        else:
            right = (right * proposal.captured).to(wide)
        return multiply(left, right.mT, out=out)
    if isinstance(full, Seen):
        rows, full = _scales_in_rows(rows, full)
    if full is None:
        return multiply(left, right.mT, out=out)
    if rows is not None:
        torch.mul(full, rows, out=out)
    elif full is not out:
        out.copy_(full)
    return multiply_add(out, left, right.mT, out=out)


def _formed_is_less(
    found: Proposal, sides: dict[str, Follows], shape: tuple[int, ...], part: Part, feedback: bool
) -> bool:
    """Return whether a rank receives less of U, and of what error feedback takes, than of thin factors.

    That is so over many ranks, because each gets the whole of the factor that is not sharded.
    Every rank has the same answer.
    """
    if found.left is None or found.right is None:
        return False
    ranks = {name: prod(axis.size for axis in part.side(name).axes) for name in BOTH}

    def elements(proposal: Proposal) -> float:
        names, tensors = _travelling(proposal)
        follows = [_follows(name, tensor, sides) for (name, *_), tensor in zip(names, tensors, strict=True)]
        return sum(
            prod(x.shape[1:]) / prod(ranks.get(dim, 1) for dim in dims)
            for x, dims in zip(tensors, follows, strict=True)
        )

    rest = replace(found, left=None, right=None, rows=None, captured=None, beyond=None)
    formed = prod(shape) * (2 if feedback and found.captured is not None else 1)
    return formed / prod(ranks.values()) + elements(rest) < elements(found)


def _dims(dims: Any) -> Follows:
    """Return what the two dimensions of a slot after the batch follow."""
    first, second = (dim if isinstance(dim, str) else "own" for dim in dims)
    return first, second


def _follows(name: str, tensor: Tensor, sides: dict[str, Follows]) -> Follows:
    if name == "basis":
        return sides["Q"]
    if name == "selected":
        return ("rows", "one") if tensor.shape[2] == 1 else ("one", "columns")
    return FOLLOWS[name]


def _travelling(proposal: Proposal) -> tuple[list[list[str]], list[Tensor]]:
    """Return the tensors of a proposal, each once, and the names of the fields that hold each.

    What the direction has seen is left out: every rank has it already.
    """
    names: dict[int, list[str]] = {}
    tensors: list[Tensor] = []
    for name in FOLLOWS:
        value = getattr(proposal, name)
        if isinstance(value, Tensor):
            if id(value) not in names:
                tensors.append(value)
            names.setdefault(id(value), []).append(name)
    return list(names.values()), tensors


def _arrived(proposal: Proposal, names: list[list[str]], tensors: list[Tensor], seen: Seen) -> Proposal:
    """Return the proposal with the tensors that have arrived in its fields."""
    fields = {name: tensor for several, tensor in zip(names, tensors, strict=True) for name in several}
    full = {"full": seen} if isinstance(proposal.full, Seen) else {}
    return replace(proposal, **fields, **full)


def _published(proposal: Proposal, move: Move, transport: Transport) -> Task:
    """Return what all weights take and how far they move, including matrices whose state another replica keeps."""
    left, rows, full, factor = proposal.left, proposal.rows, proposal.full, proposal.factor
    if factor is not None:
        left = None if left is None else (left * factor).to(left.dtype)
        rows = rows if full is None else factor if rows is None else rows * factor
    if isinstance(full, Seen):
        rows, full = _scales_in_rows(rows, full)
    if not transport.owners:
        return Applied(left, proposal.right, rows, full), move
    numbers = {
        name: value for name in ("size", "decay") if isinstance(value := getattr(move, name), Tensor) and value.ndim
    }
    fields = {"left": left, "right": proposal.right, "rows": rows, "full": full}
    mine = {name: tensor for name, tensor in {**fields, **numbers}.items() if tensor is not None}
    theirs = dict(zip(mine, (yield from transport.gather_from_owners(list(mine.values()))), strict=True))
    move = replace(move, **{name: theirs[name] for name in numbers})
    return Applied(*(theirs.get(name) for name in fields)), move


def _scales_in_rows(rows: Tensor | None, seen: Seen) -> tuple[Tensor | None, Tensor]:
    """Write diag(rows) X as diag(d) N and return d and N; or form X if the scales cannot be factors of the rows."""
    # where reading is free, a size is given only if it is extreme, and a factor of the rows could then overflow float32
    if seen.columns is not None or (seen.size is not None and sync_is_free(seen.N)):
        return rows, seen.formed()
    scales = [scale for scale in (rows, seen.rows) if scale is not None]
    if seen.size is None and len(scales) < 2:
        return next(iter(scales), None), seen.N
    if seen.size is not None and not scales:
        return seen.size.reciprocal().expand(-1, seen.N.shape[1], 1), seen.N
    held = torch.promote_types(seen.N.dtype, torch.float32)
    product = reduce(torch.mul, scales[1:], scales[0].double())  # partial products may overflow float32
    if seen.size is not None:
        product = product / seen.size
    return product.clamp_(max=torch.finfo(held).max).to(held), seen.N
