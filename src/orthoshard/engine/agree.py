"""What all ranks of a mesh must know alike: that their plans are equal, and, at each step, whose gradients are there.

Both are maxima over the axes of each mesh that holds parameters. May import torch, `plan`, `layout` and `comm`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Axis
from ..plan import Entry, Plan
from .comm import Comm


def agree_on_gradients(plan: Plan, numbers: Sequence[float], comm: Comm) -> list[float]:
    """The survey of `gradients.survey`, as the maximum over every mesh: a gradient that is absent everywhere stays
    absent, one that is not finite anywhere is so for all. Where several meshes meet, they agree on that in a second
    round."""
    agreed = list(numbers)
    groups = plan.meshes()
    bad = max(numbers, default=0.0)
    for axes, members in groups:
        vector = _maximum([*(agreed[i] for i in members), bad], axes, plan.entries[members[0]], comm)
        *values, bad = vector.tolist()
        for i, value in zip(members, values, strict=True):
            agreed[i] = value
    if len(groups) > 1:
        for axes, members in groups:
            bad = _maximum([bad], axes, plan.entries[members[0]], comm).item()
    return [torch.inf] * len(agreed) if bad == torch.inf else agreed


def agree_on_plan(plan: Plan, comm: Comm) -> None:
    """Raises RuntimeError on every rank of a mesh whose ranks have different plans, naming the first difference."""
    for axes, members in plan.meshes():
        entries = [plan.entries[i] for i in members]
        count = float(len(entries))
        most, least = _maximum([count, -count], axes, entries[0], comm).tolist()
        if most != -least:
            raise RuntimeError(
                f"ranks of the mesh {', '.join(map(str, axes))} have between {-least:.0f} and {most:.0f} parameters on "
                f"it: build the same model and the same parameter groups on every rank"
            )
        digests = [_digest(entry.signature) for entry in entries]
        highest, lowest = _maximum([*digests, *(-d for d in digests)], axes, entries[0], comm).view(2, -1).tolist()
        for entry, high, low in zip(entries, highest, lowest, strict=True):
            if high != -low:
                raise RuntimeError(
                    f"ranks of the mesh {', '.join(map(str, axes))} differ from parameter {entry.name!r} on (here: "
                    f"{entry.signature}): build the same model and the same parameter groups on every rank"
                )


def _maximum(values: Sequence[float], axes: Sequence[Axis], entry: Entry, comm: Comm) -> Tensor:
    vector = torch.tensor(values, dtype=torch.float64, device=entry.device)
    for axis in axes:
        comm.all_reduce(vector, axis, "max").wait()
    return vector


def _digest(text: str) -> float:
    """52 bits, so that float64 holds them exactly."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12)
