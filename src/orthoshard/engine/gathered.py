"""State that replicas divide among themselves, brought together for a checkpoint.

May import torch, `plan` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..plan import Plan
from .comm import Comm
from .gather import finish, gather_all
from .storage import Storage


def gathered_state(plan: Plan, stores: Sequence[Storage], comm: Comm) -> list[dict[str, Tensor]]:
    """Return, for each entry whose state one replica keeps, copies of its local pieces, at every replica.

    The dict of every other entry is empty. All ranks must call this together.
    """
    found: list[dict[str, Tensor]] = []
    for bucket, store in zip(plan.buckets, stores, strict=True):
        pieces: list[dict[str, Tensor]] = [{} for _ in bucket.entries]
        counts = [entry.batch for entry in bucket.entries]
        for name, own in store.stacked.items() if bucket.owners else ():
            (whole,) = finish(gather_all([own.to(bucket.entries[0].device)], bucket.shares(), bucket.owners, comm))
            for entry, piece, part in zip(bucket.entries, pieces, whole.to(own.device).split(counts), strict=True):
                piece[name] = part.view(entry.state_layout(dict(entry.slots)[name]).local)
        found += pieces
    return found
