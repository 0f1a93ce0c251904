"""What all ranks of a mesh must agree on: that their plans are equal and, at each step, which gradients exist.

Both are maxima over the axes of each mesh that holds parameters. May import torch, `plan`, `layout` and this room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Axis
from ..plan import Entry, Plan
from .comm import Comm
from .gradients import ABSENT

REFUSED = 3  # above every level that `notes` can record
MISPLACED = 2.0  # above "not finite", which is checked again once the gradients have been moved
SAME_RATE = 1e-6  # relative: the cosines of two machines may differ by as much


@dataclass(frozen=True)
class GradientStatus:
    """What all ranks know of the gradients of a step.

    largest    one number per parameter, as in `gradients.largest_gradients`: the largest over all ranks
    uneven     whether the parameter has a gradient on some ranks and none on others
    finite     whether every entry of every gradient is finite, on every rank
    refused    whether any rank has a gradient that it cannot take
    misplaced  whether any rank has a gradient not placed as its parameter: the other fields are then preliminary
    recording  the highest level that any rank asks `notes` to record of the step
    replanned  whether any rank has made its plan anew since plans were last compared
    uneven_rates  whether ranks have different learning rates for a group, on any mesh
    """

    largest: list[float]
    uneven: list[bool]
    finite: bool
    refused: bool
    misplaced: bool
    recording: int
    replanned: bool
    uneven_rates: bool

    @property
    def absent(self) -> bool:
        """Whether no parameter has a gradient, on any rank."""
        return all(number == ABSENT for number in self.largest)

    @property
    def zero(self) -> bool:
        """Whether every gradient is absent or zero."""
        return all(number <= 0 for number in self.largest)


def agree_on_gradients(
    plan: Plan,
    numbers: Sequence[float],
    rates: Sequence[float],
    comm: Comm,
    *,
    refused: bool,
    misplaced: bool,
    replanned: bool,
    recording: int = 0,
) -> GradientStatus:
    """Agree on `gradients.largest_gradients`: take the maximum over every mesh.

    If there are several meshes, they agree on what concerns the whole step in a second round. ``rates`` holds the
    learning rate of each group.
    """
    largest, uneven = list(numbers), [False] * len(numbers)
    meshes = plan.meshes
    asked = float(REFUSED if refused else recording)  # one number: a refused step records nothing
    known = MISPLACED if misplaced else float(torch.inf in numbers)
    whole = [known, asked, float(replanned), 0.0]  # what concerns the whole step
    for axes, members in meshes:
        mine = [largest[i] for i in members]
        absent = [float(number == ABSENT) for number in mine]
        theirs = [rates[group] for group in dict.fromkeys(plan.entries[i].group for i in members)]
        vector = [*mine, *absent, *theirs, *(-rate for rate in theirs), *whole]
        agreed = _maximum(vector, axes, plan.entries[members[0]], comm).tolist()
        highest, lowest = (agreed[2 * len(mine) + start :][: len(theirs)] for start in (0, len(theirs)))
        whole = agreed[-len(whole) :]
        whole[3] = max(whole[3], *(high + low > SAME_RATE * high for high, low in zip(highest, lowest, strict=True)))
        for i, number, missing in zip(members, agreed, agreed[len(members) :], strict=False):
            largest[i], uneven[i] = number, missing > 0 and number != ABSENT
    if len(meshes) > 1:
        for axes, members in meshes:
            whole = _maximum(whole, axes, plan.entries[members[0]], comm).tolist()
    refused, recording = whole[1] == REFUSED, int(whole[1])
    finite, misplaced = whole[0] == 0, whole[0] == MISPLACED
    return GradientStatus(largest, uneven, finite, refused, misplaced, recording, whole[2] > 0, whole[3] > 0)


def agree_on_plan(plan: Plan, comm: Comm) -> None:
    """Check that all ranks of each mesh have the same plan.

    Raises RuntimeError on every rank of a mesh with different plans, naming the first difference.
    """
    meshes = plan.meshes
    updates = [
        [(update.first_owner, update.replicas, update.dealt) for update in bucket.updates] for bucket in plan.buckets
    ]
    bucket_of = [f"{i}/{updates[i]}" for i, bucket in enumerate(plan.buckets) for _ in bucket.entries]
    for axes, members in meshes:
        entries = [plan.entries[i] for i in members]
        count = float(len(entries))
        most, least = _maximum([count, -count], axes, entries[0], comm).tolist()
        if most != -least:
            raise RuntimeError(
                f"ranks of the mesh {', '.join(map(str, axes))} have between {-least:.0f} and {most:.0f} parameters on "
                f"it: build the same model and the same parameter groups on every rank"
            )
        digests = [
            _digest(f"{len(meshes)} {bucket_of[i]} {entry.signature}")
            for i, entry in zip(members, entries, strict=True)
        ]
        highest, lowest = _maximum([*digests, *(-d for d in digests)], axes, entries[0], comm).view(2, -1).tolist()
        for entry, high, low in zip(entries, highest, lowest, strict=True):
            if high != -low:
                raise RuntimeError(
                    f"ranks of the mesh {', '.join(map(str, axes))} differ from parameter {entry.name!r} on (here: "
                    f"{entry.signature}): build the same model and the same parameter groups on every rank"
                )


def _maximum(values: Sequence[float], axes: Sequence[Axis], entry: Entry, comm: Comm) -> Tensor:
    return comm.reduced(torch.tensor(values, dtype=torch.float64, device=entry.device), axes, "max")


def _digest(text: str) -> float:
    """Return 52 bits of a hash of the text, so that float64 holds them exactly."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12)
