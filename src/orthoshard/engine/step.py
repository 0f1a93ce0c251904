"""One step of all buckets: who has a gradient, whether all are finite, then every bucket's update.

May import torch, `rules`, `plan` and this room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..plan import Plan
from ..rules import Batch, Rule
from ..rules.request import Update
from .gradients import ABSENT, gradient_of, survey
from .run import run
from .storage import Storage


class Step:
    """The parameters of a plan, with their gradients, on the eve of a step."""

    def __init__(self, plan: Plan, stores: Sequence[Storage], groups: Sequence[dict[str, list[Tensor]]]) -> None:
        self.buckets = plan.buckets
        self.stores = stores
        self.parameters = [[groups[e.group]["params"][e.index] for e in bucket.entries] for bucket in plan.buckets]
        self.gradients = [
            [gradient_of(parameter, entry.name) for parameter, entry in zip(parameters, bucket.entries, strict=True)]
            for parameters, bucket in zip(self.parameters, plan.buckets, strict=True)
        ]
        self.largest = survey([gradient for gradients in self.gradients for gradient in gradients])

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

    def _updates(self, rules: Sequence[Rule]) -> Iterator[Update]:
        numbers = iter(self.largest)
        for bucket, store, parameters, gradients in zip(
            self.buckets, self.stores, self.parameters, self.gradients, strict=True
        ):
            present = [next(numbers) != ABSENT for _ in bucket.entries]
            for first, last in runs(present):
                weights = parameters[first:last]
                given = [gradient for gradient in gradients[first:last] if gradient is not None]
                if bucket.shape:
                    weights, given = _blocks(weights), _blocks(given)
                batch = Batch(weights, given, store.slots(first, last), bucket.shape)
                yield rules[bucket.group].update(batch)


def _blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parameters as (e, m, n) blocks; views, so that writing to them writes the parameters."""
    return [tensor if tensor.ndim == 3 else tensor.unsqueeze(0) for tensor in tensors]


def runs(present: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The stretches of neighbours that are present, as (first, last + 1): slices of a batch, without a copy."""
    for here, members in groupby(range(len(present)), key=lambda i: present[i]):
        if here:
            indices = list(members)
            yield indices[0], indices[-1] + 1
