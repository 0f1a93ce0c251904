"""Real processes on gloo: one call starts them, runs a list of jobs in each, and brings back what they return."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

# Imported once. torch imports its compiler where the first optimizer is built, which takes a second.
PRELOAD = [
    *("pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.checkpoint.hf_storage"),
    *("orthoshard", "orthoshard.lab.train.loop", "transformers.models.llama.modeling_llama", "accelerate"),
]


def forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_processes(world: int, jobs, timeout=240, group_timeout=60, die=0):
    """Each job (function, args) runs on every rank as ``function(rank, *args)``, in order; one group for all.

    Returns, for each job, the list of its results by rank; a failure comes back as its traceback's text, prefixed
    "failed:". ``die`` processes are expected to die; they leave None. Starts by forkserver: torch is imported once.
    """
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        path = os.path.join(folder, "store")
        processes = [
            context.Process(target=_body, args=(rank, world, path, jobs, queue, group_timeout), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        results = [[None] * world for _ in jobs]
        expected = world - die
        while expected:
            rank, answers = queue.get(timeout=timeout)
            expected -= 1
            for number, answer in enumerate(answers[: len(jobs)]):
                results[number][rank] = answer
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    return results


def _body(rank, world, path, jobs, queue, group_timeout):
    torch.set_num_threads(1)
    answers = []
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timedelta(seconds=group_timeout)
        )
        for function, args in jobs:
            try:
                answers.append(function(rank, *args))
            except Exception:
                answers.append("failed:\n" + traceback.format_exc())
            if dist.is_initialized():
                dist.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        answers.append("failed:\n" + traceback.format_exc())
    queue.put((rank, answers))
