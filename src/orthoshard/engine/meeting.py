"""A meeting of ranks before a collective that only some of them may have called.

Hosts may ask for a checkpoint on one rank alone, as they do with any other optimizer. A collective would then wait as
long as the process group allows, half an hour by default. So each rank first counts itself in torch's store, and the
last one tells the others. May import torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

# How far apart ranks may arrive: one of them may be writing, or still at work on its step.
PATIENCE = timedelta(minutes=2)


def meet(groups: Iterable[dist.ProcessGroup], what: str) -> None:
    """Wait until every rank of each group is here.

    Raises RuntimeError if some are not here within `PATIENCE`, and then leaves no trace: the next call starts anew.
    """
    for group in groups:
        store, rank = _get_default_store(), dist.get_rank()
        ranks = dist.get_process_group_ranks(group)
        name = f"orthoshard {what} {hash(tuple(ranks))}"
        mine = f"{name} by {rank}"
        time = f"{name} {store.add(mine, 1)}"
        arrived = store.add(time, 1)
        if arrived == len(ranks):
            store.set(f"{time} all", "1")
        try:
            store.wait([f"{time} all"], PATIENCE)
        except RuntimeError as error:  # `DistStoreError`; a FileStore raises a plain RuntimeError
            store.add(time, -1)
            store.add(mine, -1)
            raise RuntimeError(
                f"{what} sends between ranks here, and rank {rank} has waited {PATIENCE.seconds} s for all "
                f"{len(ranks)} of them to call it: call it on every rank and write on one, or leave out "
                f"shard_state='zero1' and replica_sync='factors'"
            ) from error
