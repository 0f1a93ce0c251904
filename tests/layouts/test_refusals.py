"""What cannot be sharded is refused with a clear error on every rank, before the first collective; never a hang."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from simulate import simulate
from table import LAYOUTS, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from orthoshard import Dion


def refused(function, world=2):
    """The sentence that every rank got."""
    sentences = simulate(world, function)
    assert all(isinstance(s, str) for s in sentences)
    return sentences


def sentence(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_partial_placements():
    def partial(rank):
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False))
        return sentence(ValueError, Dion, [("w", p)])

    for text in refused(partial):
        assert "'w'" in text
        assert "redistribute it to Replicate() or Shard(dim)" in text


def test_a_gradient_placed_otherwise_than_its_parameter():
    def other(rank):
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(place(torch.ones(4, 4), mesh, LAYOUTS["fsdp x2"]))
        optimizer = Dion([("w", p)])
        # autograd refuses to assign such a gradient, host frameworks do it behind its back
        grad = DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()], run_check=False)
        object.__setattr__(p, "grad", None)
        text = sentence(RuntimeError, _local_gradient, p, grad)
        optimizer.step()
        return text

    for text in refused(other):
        assert "redistribute the gradient" in text


def _local_gradient(parameter, gradient):
    from orthoshard.layout import local_gradient

    return local_gradient("w", parameter, gradient)


def test_ranks_that_built_different_models():
    def different(rank):
        mesh = init_device_mesh("cpu", (2,))
        shapes = [(4, 4), (6, 4 + 2 * rank), (4, 8)]
        named = [(f"w{i}", nn.Parameter(place(torch.ones(s), mesh, LAYOUTS["fsdp x2"]))) for i, s in enumerate(shapes)]
        return sentence(RuntimeError, Dion(named).step)

    for text in refused(different):
        assert "differ from parameter 'w1' on" in text
        assert "same model" in text


def test_ranks_with_different_numbers_of_parameters():
    def different(rank):
        mesh = init_device_mesh("cpu", (2,))
        named = [(f"w{i}", nn.Parameter(place(torch.ones(4, 4), mesh, LAYOUTS["fsdp x2"]))) for i in range(2 + rank)]
        return sentence(RuntimeError, Dion(named).step)

    for text in refused(different):
        assert "between 2 and 3 parameters" in text


def test_ranks_with_different_options():
    def different(rank):
        mesh = init_device_mesh("cpu", (2,))
        named = [("w", nn.Parameter(place(torch.ones(8, 8), mesh, LAYOUTS["fsdp x2"])))]
        return sentence(RuntimeError, Dion(named, rank_fraction=0.25 * (1 + rank)).step)

    for text in refused(different):
        assert "differ from parameter 'w' on" in text


def mesh_gone(rank):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False))
    dist.barrier()
    dist.destroy_process_group()
    try:
        Dion([("w", p)])
        text = "nothing was refused"
    except ValueError as error:
        text = str(error)
    return text


def test_a_mesh_whose_process_group_is_gone():
    (texts,) = run_processes(2, [(mesh_gone, ())])
    for text in texts:
        assert "process group" in text, text
