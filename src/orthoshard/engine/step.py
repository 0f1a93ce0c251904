"""One step of all buckets: who has a gradient, whether all are finite, then every bucket's update.

May import torch, `rules`, `plan`, `layout` and this room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..layout import local_of
from ..plan import Plan
from ..rules import Batch, Rule
from .agree import agree_on_gradients
from .answers import Answer, Answers, drive
from .comm import Comm
from .gradients import gradient_of, survey
from .run import run
from .storage import Storage


class Step:
    """The parameters of a plan, with their gradients, on the eve of a step."""

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Storage],
        groups: Sequence[dict[str, Any]],
        comm: Comm,
        *,
        replanned: bool,
    ) -> None:
        self.plan = plan
        self.stores = stores
        self.comm = comm
        parameters = [groups[entry.group]["params"][entry.index] for entry in plan.entries]
        self.weights = [local_of(parameter) for parameter in parameters]
        self.gradients: list[Tensor | None] = []
        refusal: RuntimeError | None = None
        for parameter, entry in zip(parameters, plan.entries, strict=True):
            try:
                self.gradients.append(gradient_of(parameter, entry.name))
            except RuntimeError as error:
                refusal = refusal or error
                self.gradients.append(None)
        numbers = survey(self.gradients)
        self.agreed = agree_on_gradients(plan, numbers, comm, refused=refusal is not None, replanned=replanned)
        if refusal:
            raise refusal
        if self.agreed.refused:
            raise RuntimeError("another rank has a gradient that it cannot take; its own error says which and why")

    @property
    def zero(self) -> bool:
        """Whether every gradient is absent or zero."""
        return all(number <= 0 for number in self.agreed.largest)

    @property
    def finite(self) -> bool:
        return self.agreed.finite

    def take(self, rules: Sequence[Rule]) -> None:
        """Update every parameter that has a gradient. ``rules``: one a group."""
        self._even_out()
        run(self._updates(rules))

    def _even_out(self) -> None:
        """A gradient that is there on some ranks only counts as zero on the others. Where replicas hold the parameter
        they must go on alike, so that they take the mean."""
        for i, (entry, uneven) in enumerate(zip(self.plan.entries, self.agreed.uneven, strict=True)):
            if not uneven:
                continue
            gradient = self.gradients[i]
            gradient = torch.zeros_like(self.weights[i]) if gradient is None else gradient
            for axis in entry.layout.replicas:
                gradient = (gradient / axis.size).contiguous()  # a copy: the user's gradient is never modified
                self.comm.all_reduce(gradient, axis).wait()
            self.gradients[i] = gradient

    def _updates(self, rules: Sequence[Rule]) -> Iterator[Answer]:
        start = 0
        for bucket, store in zip(self.plan.buckets, self.stores, strict=True):
            members = slice(start, start + len(bucket.entries))
            start = members.stop
            weights, gradients = self.weights[members], self.gradients[members]
            answers = Answers(bucket.entries[0].layout, self.comm, bucket.dealt, bucket.share)
            for first, last in runs([gradient is not None for gradient in gradients]):
                mine = weights[first:last]
                theirs = [gradient for gradient in gradients[first:last] if gradient is not None]
                if bucket.shape:
                    mine, theirs = _blocks(mine), _blocks(theirs)
                batch = Batch(mine, theirs, store.slots(first, last), bucket.shape)
                yield drive(rules[bucket.group].update(batch), answers)


def _blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parameters as (e, m, n) blocks; views, so that writing to them writes the parameters."""
    return [tensor if tensor.ndim == 3 else tensor.unsqueeze(0) for tensor in tensors]


def runs(present: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The stretches of neighbours that are present, as (first, last + 1): slices of a batch, without a copy."""
    for here, members in groupby(range(len(present)), key=lambda i: present[i]):
        if here:
            indices = list(members)
            yield indices[0], indices[-1] + 1
