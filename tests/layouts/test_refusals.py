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
from torch.distributed.tensor import DTensor, Partial, Shard

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


@pytest.mark.parametrize("cut", [True, False], ids=["plain for DTensor", "DTensor for plain"])
def test_a_gradient_of_the_other_kind_of_tensor(cut):
    def other(rank):
        mesh = init_device_mesh("cpu", (2,))
        whole, piece = torch.ones(4, 4), place(torch.ones(4, 4), mesh, LAYOUTS["replicated x2"])
        p = nn.Parameter(piece if cut else whole)
        optimizer = Dion([("w", p)])
        p.grad = whole if cut else piece
        return sentence(RuntimeError, optimizer.step)

    for text in refused(other):
        assert "'w'" in text
        assert ("DTensor.from_local" if cut else "full_tensor()") in text


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
