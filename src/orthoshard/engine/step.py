"""One step of all buckets: who has a gradient, whether all are finite, then every bucket's update.

May import torch, `linalg`, `stages`, `elementwise`, `rule`, `rules`, `plan`, `layout` and this room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from ..elementwise import ElementwiseRule, Entries
from ..layout import Axis, local_of
from ..linalg.found_inf import FoundInf
from ..linalg.host_sync import no_host_sync
from ..plan import Bucket, BucketUpdate, Entry, Plan
from ..rule import Rule
from ..rules import MatrixRule
from ..stages import Batch
from .agree import GradientStatus, agree_on_gradients, agree_on_plan
from .batcher import CallBatcher
from .comm import Comm
from .driver import update
from .gather import Task
from .gradients import found_nonfinite, largest_gradients
from .notes import Notes
from .offload import Lender, Loan
from .pairs import gram
from .placing import agree_on_moves, find_gradient, moved
from .replicas import averaged
from .rounding import roundings
from .run import run
from .storage import Storage
from .transport import Transport

# Bytes of state of elementwise rules that are copied from host memory at a time.
LENT_BYTES = 2**28


@dataclass(frozen=True)
class _Piece:
    """Entries of a bucket whose state is copied together, or all of them.

    start  index in the plan of the bucket's first entry
    range  (first, last + 1) of these entries in the bucket; ``spans``: the runs of them that have gradients
    store  of the bucket; ``loan``: of its state in host memory
    """

    bucket: Bucket
    start: int
    range: tuple[int, int]
    spans: list[tuple[int, int]]
    store: Storage
    loan: Loan | None


class Step:
    """The parameters of a plan, with their gradients, just before the weights move."""

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Storage],
        groups: Sequence[dict[str, Any]],
        comm: Comm,
        lender: Lender,
    ) -> None:
        self._lender = lender
        self.plan = plan
        self.stores = stores
        self.comm = comm
        self.groups = groups
        self._parameters = parameters = plan.parameters(groups)
        self.weights = [local_of(parameter) for parameter in parameters]
        self._found = [find_gradient(p, entry.name) for p, entry in zip(parameters, plan.entries, strict=True)]
        self._refusal = next((found.refusal for found in self._found if found.refusal), None)
        self.gradients = [found.local for found in self._found]
        self._batcher = CallBatcher()
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._notes: Notes | None = None
        self._skip: FoundInf | None = None
        self.has_moved = False  # whether any gradient, on any rank, was placed otherwise than its parameter

    @property
    def present(self) -> tuple[bool, ...]:
        """Which parameters have a gradient."""
        return tuple(gradient is not None for gradient in self.gradients)

    @property
    def misplaced(self) -> bool:
        """Whether this rank has a gradient that is placed otherwise than its parameter."""
        return any(found.misplaced for found in self._found)

    def agree(self, *, replanned: bool, recording: int = 0) -> GradientStatus:
        """Agree with all ranks on the gradients, and move them to the placements of their parameters. Raises
        RuntimeError on every rank if one has a gradient that it cannot take, or if plans that were made anew differ."""
        agreed = self._ask(replanned, recording, self.misplaced)
        if agreed.replanned:
            agree_on_plan(self.plan, self.comm)
        if agreed.misplaced:
            self.has_moved = True
            self._move()
            agreed = self._ask(replanned, recording, False)  # a sum of finite terms may not be finite
        return agreed

    def _ask(self, replanned: bool, recording: int, misplaced: bool) -> GradientStatus:
        rates = [_known_rate(group["lr"]) for group in self.groups]
        agreed = agree_on_gradients(
            self.plan,
            largest_gradients(self.gradients),
            rates,
            self.comm,
            refused=self._refusal is not None,
            misplaced=misplaced,
            replanned=replanned,
            recording=recording,
        )
        if self._refusal:
            raise self._refusal
        if agreed.refused:
            raise RuntimeError("another rank has a gradient that it cannot take; its own error says which and why")
        if agreed.uneven_rates:
            here = ", ".join(map(repr, dict.fromkeys(rates)))
            raise RuntimeError(
                f"ranks have different learning rates for the same parameters (here: {here}): "
                f"advance the same scheduler on every rank; one that reads a loss, such as ReduceLROnPlateau, needs "
                f"the mean over all ranks"
            )
        return agreed

    def _move(self) -> None:
        """Bring gradients to where their parameters are."""
        layouts = [entry.layout for entry in self.plan.entries]
        places = agree_on_moves(layouts, self._found, self.weights, self.comm)
        if places.unclear:
            name = self.plan.entries[places.unclear[0]].name
            self._refusal = RuntimeError(
                f"the gradient of {name!r} is placed in different ways on different ranks; redistribute it to the "
                f"parameter's placements on all of them before the step"
            )
        self.gradients = moved(layouts, self._found, places.moves, self.weights, self.comm)

    def take(self, rules: Sequence[Rule], agreed: GradientStatus, notes: Notes | None = None) -> None:
        """Update every parameter that has a gradient. ``rules``: one per group; ``notes``: where to
        record figures, if anywhere."""
        self._notes = notes
        self._even_out(agreed)
        self._run(rules)

    def take_unattended(self, rules: Sequence[Rule], also: Tensor | None = None) -> FoundInf:
        """Do the same without reading anything on the host. Every rank must have gradients of the same parameters.

        Nothing changes if any gradient on any rank is not finite, or if the flag ``also`` is up; only the devices know.
        Returns that flag. A learning rate of 0 leaves the weights as they are, if the direction is finite; state is
        written by functions that take the flag themselves.
        """
        if self._refusal:
            raise self._refusal
        with no_host_sync():
            skip = found_nonfinite([g for g in self.gradients if g is not None], self.plan.entries[0].device)
            if also is not None or self.plan.meshes:
                skip = FoundInf.where(self._anywhere(skip.flag if also is None else skip.flag | also))
            self._skip = skip
            self._run([replace(rule, lr=torch.where(self._skip.flag, 0, rule.lr)) for rule in rules])
        return self._skip

    def _anywhere(self, flag: Tensor) -> Tensor:
        """Return whether the flag is up on any rank of any mesh; the host does not read it. If there are several
        meshes, they need a second round, as in `agree_on_gradients`."""
        meshes = self.plan.meshes
        number = flag.to(torch.float32)
        for axes, _ in meshes * min(len(meshes), 2):
            self.comm.reduced(number, axes, "max")
        return number > 0

    def _grams_of_factors(self) -> dict[str, Tensor]:
        """Return the Gram matrix of each factor of a pair, by name, before any weight moves."""
        found: dict[str, Tensor] = {}

        def of_bucket(bucket: Bucket, weights: Sequence[Tensor], side: Literal["rows", "columns"]) -> Task:
            part = replace(bucket.updates[0].part, some=(0, 1))
            stacks = [entry.stack(w) for entry, w in zip(bucket.entries, weights, strict=True)]
            X = torch.cat([part.view_of(stack) for stack in stacks])
            transport = Transport(part, self.comm, self._batcher, 0, "repeat")
            grams = yield from gram(X, side, transport)
            parts = grams.split([entry.batch for entry in bucket.entries])
            found.update(zip([entry.name for entry in bucket.entries], parts, strict=True))

        tasks, start = list[tuple[Task, int]](), 0
        for bucket in self.plan.buckets:
            if pair := bucket.entries[0].pair:
                tasks.append((of_bucket(bucket, self.weights[start : start + len(bucket.entries)], pair.side), 0))
            start += len(bucket.entries)
        run(tasks)
        return found

    def _run(self, rules: Sequence[Rule]) -> None:
        self._grams = self._grams_of_factors()
        self._lender.begin()
        run(self._updates(rules))
        self._lender.finish()
        for weight, copy in self._copies:
            weight.copy_(copy)
        # Autograd does not notice what fused kernels write, or what is written to local pieces of DTensors. Without
        # this, a backward pass through weights that have moved since the forward pass would give wrong gradients
        # instead of autograd's error.
        moved = [p for p, gradient in zip(self._parameters, self.gradients, strict=True) if gradient is not None]
        torch.autograd.graph.increment_version(moved)

    def _even_out(self, agreed: GradientStatus) -> None:
        """Use zeros for a gradient that exists on some ranks only. Replicas with equal gradients must move
        alike, so they take the mean."""
        for i, (entry, uneven) in enumerate(zip(self.plan.entries, agreed.uneven, strict=True)):
            if not uneven:
                continue
            gradient = self.gradients[i]
            dtype = torch.promote_types(entry.dtype, torch.float32)  # the same on all ranks, whatever they brought
            zeros = torch.zeros_like(self.weights[i], dtype=dtype)
            gradient = zeros if gradient is None else gradient.to(dtype)
            equal = [axis for axis in entry.layout.replicas if axis not in entry.layout.unreduced_axes]
            for axis in equal:
                gradient = (gradient / axis.size).contiguous()  # a copy: the user's gradient is never modified
                self.comm.all_reduce(gradient, axis).wait()
            self.gradients[i] = gradient

    def _updates(self, rules: Sequence[Rule]) -> Iterator[tuple[Task, int]]:
        """Yield every update, and the most bytes of temporaries that it holds on any rank."""
        pieces = list(self._pieces())
        for piece, following in zip(pieces, [*pieces[1:], None], strict=False):  # there may be none
            rule = rules[piece.bucket.group]
            if piece.loan is None:
                yield from self._of_piece(piece, piece.store, rule)
            else:
                store = piece.store.on_device(*piece.range, piece.loan.start())
                yield from piece.loan.around(self._of_piece(piece, store, rule), following.loan if following else None)

    def _pieces(self) -> Iterator[_Piece]:
        """Yield every bucket; if its state is in host memory, as much of the bucket as is copied together."""
        start = 0
        for bucket, store in zip(self.plan.buckets, self.stores, strict=True):
            present = [gradient is not None for gradient in self.gradients[start : start + len(bucket.entries)]]
            offload, device = bucket.entries[0].offload, bucket.entries[0].device
            for first, last in bucket.stretches(LENT_BYTES) if offload else [(0, len(bucket.entries))]:
                spans = [(first + a, first + b) for a, b in runs(present[first:last])]
                loan = Loan(self._lender, store.host_tensors(first, last), device) if offload else None
                if spans:
                    yield _Piece(bucket, start, (first, last), spans, store, loan)
            start += len(bucket.entries)

    def _of_piece(self, piece: _Piece, store: Storage, rule: Rule) -> Iterator[tuple[Task, int]]:
        bucket = piece.bucket
        for first, last in piece.spans:
            members = slice(piece.start + first, piece.start + last)
            theirs = [gradient for gradient in self.gradients[members] if gradient is not None]
            tasks = partial(self._tasks, bucket, rule, store, (first, last), self.weights[members])
            if bucket.averaged:
                peak = max((planned.peak for planned in bucket.updates), default=0)  # one after the other
                yield self._averaged(theirs, bucket.entries[0].layout.unreduced_axes, tasks), peak
            else:
                yield from tasks(theirs)

    def _averaged(
        self,
        gradients: list[Tensor],
        sources: Sequence[Axis],
        tasks: Callable[[list[Tensor]], Iterator[tuple[Task, int]]],
    ) -> Task:
        """Average the gradients over the replicas on which they differ, then run the tasks that
        take them, all as one task."""
        means = yield from averaged(gradients, sources, self.comm)
        for task, _ in tasks(means):
            yield from task

    def _tasks(
        self,
        bucket: Bucket,
        rule: Rule,
        store: Storage,
        span: tuple[int, int],
        weights: list[Tensor],
        gradients: list[Tensor],
    ) -> Iterator[tuple[Task, int]]:
        entries = bucket.entries[slice(*span)]
        if not bucket.updates:
            rounding = roundings(rule, self.groups[bucket.group], entries)
            assert isinstance(rule, ElementwiseRule)
            rule.step(Entries(weights, gradients, store.lists(*span), rounding, self._skip))
            return
        mine = [self._writable(entry, weight) for entry, weight in zip(entries, weights, strict=True)]
        theirs = [entry.stack(g) for entry, g in zip(entries, gradients, strict=True) if entry.is_owner]
        for planned in bucket.updates:
            yield self._matrices(bucket, rule, store, span, planned, mine, theirs), planned.peak

    def _matrices(
        self,
        bucket: Bucket,
        rule: Rule,
        store: Storage,
        span: tuple[int, int],
        planned: BucketUpdate,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> Task:
        """Run one update, then write back what had to be copied."""
        part = planned.part
        entries = bucket.entries[slice(*span)]
        mine, theirs = [part.view_of(weight) for weight in weights], [part.view_of(gradient) for gradient in gradients]
        own = [weight for weight, entry in zip(mine, entries, strict=True) if entry.is_owner]
        state = store.batches(*span, planned)
        rounding = roundings(rule, self.groups[bucket.group], entries, part)
        batch = Batch(mine, own, theirs, state, part.matrix, rounding, self._skip)
        record = partial(self._notes.take, entries) if self._notes else None
        transport = Transport(
            part, self.comm, self._batcher, planned.first_owner, planned.replicas, bucket.shares(planned, *span)
        )
        assert isinstance(rule, MatrixRule)
        if pair := entries[0].pair:
            r = part.side(pair.side).length
            grams = [self._grams[e.pair.partner] for e in entries if e.pair and e.is_owner]
            none = torch.empty(0, r, r, dtype=torch.float64, device=entries[0].device)
            batch.gram = part.view_of(torch.cat([none, *grams]), (r, r))
            batch.gram_side, batch.product = pair.side, pair.product
        yield from update(rule, batch, transport, planned.dealt, record)
        store.put_back(*span, planned, state)
        if part.needs_copy():
            for weight, copy in zip(weights, mine, strict=True):
                part.write_back(weight, copy)

    def _writable(self, entry: Entry, weight: Tensor) -> Tensor:
        """Return the weight as (B, ...), with matrices that can be written in place; or a copy, which is written
        back at the end of the step."""
        plain = entry.plain(weight)
        if plain is not weight:
            self._copies.append((weight, plain))
        return entry.stack(plain)


def _known_rate(lr: Any) -> float:
    """Return a learning rate as ranks compare it; 0 if reading it would wait for a device."""
    return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def runs(present: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the runs of consecutive entries that are present, as (first, last + 1): slices
    of a batch, without a copy."""
    for here, members in groupby(range(len(present)), key=lambda i: present[i]):
        if here:
            indices = list(members)
            yield indices[0], indices[-1] + 1
