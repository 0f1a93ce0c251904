"""Many ranks in one process: a thread a rank, on torch's threaded process group, with real values.

Fails where ranks that share an axis have issued different collectives: each rank keeps a journal of what it asked of
each group, and the journals are compared at the end; and where their updates have taken turns more or less often, which
real processes may not survive. A rank that fails ends the others.
"""

from __future__ import annotations

import threading
import traceback
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from orthoshard.engine import run
from orthoshard.engine.comm import Comm

_thread = threading.local()


class JournalingComm:
    """Stands in for `Comm._start`: notes what a rank asks of an axis before it is asked."""

    def __init__(self, start):
        self.start = start

    def __get__(self, comm, _):
        def start(what, axis, call):
            _thread.journal[axis.key, dist.get_process_group_ranks(axis.group)[0]].append(what)
            return self.start(comm, what, axis, call)

        return start


def turn(waiting, original=run._turn):
    if waiting[0][0].__name__ != "update":  # one of a step, and not run dry, which the first rank to ask does
        _thread.journal["turns"].append(len(waiting))
    return original(waiting)


def simulate(world: int, function, *args, timeout=60):
    """``function(rank, *args)`` on every simulated rank; the list of its results. Raises the first failure."""
    if torch.__version__ < (2, 12):
        pytest.skip("torch before 2.12 crashes where several threads propagate placements by fake tensors")
    results, failures = [None] * world, {}
    journals = [defaultdict(list) for _ in range(world)]
    store = dist.HashStore()

    def body(rank):
        _thread.journal = journals[rank]
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = function(rank, *args)
            dist.barrier()
        except SystemExit:
            pass  # another rank has failed first
        except BaseException as error:
            failures[rank] = traceback.format_exc()
            ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    original = Comm._start
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    Comm._start, run._turn = JournalingComm(original), turn
    try:
        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        hung = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    finally:
        Comm._start, run._turn = original, turn.__defaults__[0]
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failures:
        raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
    if hung:
        raise TimeoutError(f"ranks {hung} hang")
    _compare(journals)
    return results


def _compare(journals):
    """Every rank of a group must have asked the same of it, in the same order."""
    for rank, journal in enumerate(journals):
        for group, asked in journal.items():
            for other, theirs in enumerate(journals):
                if group in theirs:
                    assert theirs[group] == asked, f"ranks {rank} and {other} asked different things of {group}"
