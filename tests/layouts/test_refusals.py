"""What cannot be sharded is refused with a clear error on every rank, before the first collective; never a hang."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from table import LAYOUTS, place
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Shard

from orthoshard import Dion, Muon
from orthoshard.layout import local_of
from processes import run_processes
from simulate import simulate


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


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_hyperball_with_an_expert_that_starts_at_zero(dim):
    """Its values are known to all ranks together: every rank says so in the first step, and nothing has moved."""

    def zero(rank):
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.ones(4, 6, 4)
        whole[3] = 0
        pieces = [w.chunk(2, dim if w.ndim == 3 else 0)[rank].contiguous() for w in (torch.ones(4, 4), whole)]
        first, experts = (
            nn.Parameter(DTensor.from_local(piece, mesh, [Shard(d)], run_check=False))
            for piece, d in zip(pieces, (0, dim), strict=True)
        )
        optimizer = Muon([("first", first), ("experts", experts)], decay="hyperball")
        for parameter in (first, experts):
            parameter.grad = torch.ones_like(parameter)
        text = sentence(ValueError, optimizer.step)
        assert torch.equal(first.to_local(), pieces[0])
        return text

    for text in refused(zero):
        assert "'experts' has a matrix that is zero, and decay='hyperball'" in text


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


@pytest.mark.parametrize(
    "options",
    [
        {"rank_fraction": (0.25, 0.5)},
        {"shard_compute": ("in_place", "dealt")},
        {"equilibrate": ("none", "columns")},
        {"error_feedback": (True, False)},
    ],
    ids=str,
)
def test_ranks_with_different_options(options):
    def different(rank):
        mesh = init_device_mesh("cpu", (2,))
        named = [("w", nn.Parameter(place(torch.ones(8, 8), mesh, LAYOUTS["fsdp x2"])))]
        return sentence(RuntimeError, Dion(named, **{key: values[rank] for key, values in options.items()}).step)

    for text in refused(different):
        assert "differ from parameter 'w' on" in text


@pytest.mark.parametrize("layout", ["fsdp x2", "ddp x2"])
@pytest.mark.parametrize("several", [False, True])
def test_ranks_with_different_rates(layout, several):
    def different(rank):
        mesh = init_device_mesh("cpu", (2,))
        w, b = (nn.Parameter(place(torch.ones(8, 8), mesh, LAYOUTS[each])) for each in (layout, "fsdp x2"))
        given = [{"params": [("w", w)]}, *([{"params": [("b", b)], "rule": "adamw"}] if several else [])]
        optimizer = Dion(given, lr=0.1, process_group=mesh)
        for p in (w, b):
            p.grad = torch.ones_like(p)
        optimizer.step()
        before = [local_of(p).clone() for p in (w, b)]
        optimizer.param_groups[0]["lr"] *= 0.5**rank  # ReduceLROnPlateau, say, with each rank's own loss
        text = sentence(RuntimeError, optimizer.step)
        assert all(map(torch.equal, before, map(local_of, (w, b))))
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()
        return text

    for text in refused(different):
        assert "different learning rates" in text
        assert "ReduceLROnPlateau" in text


def twice(rank, optimizer, weight):
    """Two steps, with gradients of this rank's own."""
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(k, {"replica_sync": sync}) for k, sync in ((Dion, "gradients"), (Dion, "factors"), (Muon, "gradients"))]
    + [(k, {"drift_check": 1}) for k in (Dion, Muon)],
    ids=str,
)
def test_a_pickled_optimizer_asks_for_its_replicas(kind, options):
    def unpickled(rank):
        net = nn.Linear(6, 4, bias=False)
        nn.init.ones_(net.weight)
        optimizer = kind(net, process_group=dist.group.WORLD, **options)
        kept, its = copy.deepcopy((net, optimizer))
        other, lost = pickle.loads(pickle.dumps((net, optimizer)))
        same, again = pickle.loads(pickle.dumps((other, lost)))
        before = [p.detach().clone() for p in (other.weight, same.weight)]
        other.weight.grad = same.weight.grad = torch.ones(4, 6)
        texts = [sentence(RuntimeError, o.step) for o in (lost, again)]
        assert all(map(torch.equal, before, (other.weight, same.weight)))
        assert lost.state_dict()["state"] == {}
        lost.process_group = init_device_mesh("cpu", (2,))
        if "drift_check" not in options:
            assert torch.equal(twice(rank, its, kept.weight), twice(rank, lost, other.weight))
        again.process_group = None
        if "replica_sync" in options:
            texts.append(sentence(ValueError, again.step))
        return texts, kept.weight.tolist()

    (texts, weight), (_, other) = simulate(2, unpickled)
    assert weight == other
    for text in texts[:2]:
        assert "set optimizer.process_group" in text
    for text in texts[2:]:
        assert "say which ranks these are by process_group=" in text


def rows(rank, wrap):
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


def uneven_inputs(rank, throw):
    """One rank has a batch more."""
    model = rows(rank, nn.parallel.DistributedDataParallel)
    optimizer, text = Dion(model), "nothing was refused"
    before = model.module[0].weight.detach().clone()
    try:
        with model.join(throw_on_early_termination=throw):
            for _ in range(2 + rank):
                model(torch.ones(2, 8)).sum().backward()
                optimizer.step()
    except RuntimeError as error:
        text = str(error)
    return text, torch.equal(before, model.module[0].weight)


def zero_redundancy(rank, kind, matrices):
    """Some ranks have nothing that is refused in itself, some have biases."""
    model = rows(rank, nn.parallel.DistributedDataParallel)
    parameters = [p for p in model.parameters() if p.ndim == 2 or not matrices]
    return sentence(TypeError, ZeroRedundancyOptimizer, parameters, optimizer_class=kind, lr=0.02)


def groups_gone(rank):
    """Optimizers before and after their process groups are gone; their state can still be saved."""
    mesh, optimizers = init_device_mesh("cpu", (2,)), []
    for wrap in (fully_shard, nn.parallel.DistributedDataParallel):
        model = rows(rank, wrap)
        optimizers.append(Muon(model))
        model(torch.ones(2, 8)).sum().backward()
        optimizers[-1].step()
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False))
    pickled = pickle.dumps(optimizers[0])
    dist.barrier()
    dist.destroy_process_group()
    assert all(len(optimizer.state_dict()["state"]) == 4 for optimizer in optimizers)
    optimizers.append(pickle.loads(pickled))
    return [sentence(ValueError, Dion, [("w", p)]), *(sentence(ValueError, o.step) for o in optimizers)]


def test_meshes_and_replicas_whose_process_group_is_gone():
    (results,) = run_processes(2, [(groups_gone, ())])
    for texts in results:
        assert isinstance(texts, list), texts
        assert all("process group" in text for text in texts), texts


def test_optimizers_that_would_hang_beside_torchs_own():
    """Uneven inputs, and parameters dealt out by ZeroRedundancyOptimizer: an error on every rank."""
    zero = [(zero_redundancy, (kind, matrices)) for kind in (Dion, Muon) for matrices in (False, True)]
    join, stopped, *dealt = run_processes(2, [(uneven_inputs, (False,)), (uneven_inputs, (True,)), *zero])
    for text, untouched in join:
        assert "give every rank equally many batches" in text, text
        assert untouched
    for text, untouched in stopped:
        assert "exhausted" in text, text
        assert not untouched
    for texts in dealt:
        for text in texts:
            assert "shard_state='zero1'" in text, text
