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
from .gradients import ABSENT, gradient_of, survey
from .run import run
from .storage import Storage


class Step:
    """The parameters of a plan, with their gradients, on the eve of a step."""

    def __init__(self, plan: Plan, stores: Sequence[Storage], groups: Sequence[dict[str, Any]], comm: Comm) -> None:
        self.plan = plan
        self.stores = stores
        self.comm = comm
        parameters = [groups[entry.group]["params"][entry.index] for entry in plan.entries]
        self.weights = [local_of(parameter) for parameter in parameters]
        self.gradients = [gradient_of(p, entry.name) for p, entry in zip(parameters, plan.entries, strict=True)]
        self.largest = agree_on_gradients(plan, survey(self.gradients), comm)

    @property
    def zero(self) -> bool:
        """Whether every gradient is absent or zero."""
        return all(number <= 0 for number in self.largest)

    @property
    def finite(self) -> bool:
        return torch.inf not in self.largest

    def take(self, rules: Sequence[Rule]) -> None:
        """Update every parameter that has a gradient. ``rules``: one a group."""
        run(self._updates(rules))

    def _updates(self, rules: Sequence[Rule]) -> Iterator[Answer]:
        start = 0
        for bucket, store in zip(self.plan.buckets, self.stores, strict=True):
            members = slice(start, start + len(bucket.entries))
            start = members.stop
            weights, gradients = self.weights[members], self.gradients[members]
            answers = Answers(bucket.entries[0].layout, self.comm, bucket.dealt)
            for first, last in runs([number != ABSENT for number in self.largest[members]]):
                mine = weights[first:last]
                theirs = [
                    torch.zeros_like(weight) if gradient is None else gradient  # there is one on another rank
                    for weight, gradient in zip(mine, gradients[first:last], strict=True)
                ]
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
