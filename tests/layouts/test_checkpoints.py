"""Saved on one layout, loaded on another by torch.distributed.checkpoint: the trajectory goes on as uninterrupted."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import tempfile
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from blocks import Block, learn, whole
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from orthoshard import Dion, Muon
from orthoshard.layout import local_of
from processes import run_processes

LAYOUTS = {
    "one process": (1, (), ()),
    "ddp x2": (2, (2,), ("replicas",)),
    "fsdp x4": (4, (4,), ("fsdp",)),
    "tp x2": (2, (2,), ("tp",)),
    "fsdp 2 on tp 2": (4, (2, 2), ("fsdp", "tp")),
    "hsdp 2x2": (4, (2, 2), ("replicas", "fsdp")),
    "ddp x4, owners": (4, (4,), ("replicas",)),
    "hsdp 2x2, owners": (4, (2, 2), ("replicas", "fsdp")),
}
# In owner mode each replica keeps the state of its own matrices only.
OWNERS = ("ddp x4, owners", "hsdp 2x2, owners")


def dion_of_blocks(model, **options):
    """Heads that some layouts cut through and others do not, with the basis on either side; and unequal blocks."""
    groups = [
        {"params": [("up.weight", model.up.weight)], "view": "rows:10*2", "q_side": "columns"},
        {"params": [("down.weight", model.down.weight)], "view": "transposed columns:3,5"},
        {"params": [(f"norm.{n}", p) for n, p in model.norm.named_parameters()], "rule": "adamw"},
    ]
    return Dion(groups, rank_fraction=0.5, **options)


RULES = {"dion": Dion, "muon": Muon, "dion of blocks": dion_of_blocks}


def build(layout, rule):
    _, shape, names = LAYOUTS[layout]
    model, group = Block(), None
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        if "tp" in names:
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if names == ("replicas",):
            group = mesh.get_group()
        elif "replicas" in names:
            fully_shard(model, mesh=mesh)
        elif "fsdp" in names:
            fully_shard(model, mesh=mesh["fsdp"])
    kept = "zero1" if layout in OWNERS else "none"
    return model, RULES[rule](model, lr=0.05, process_group=group, shard_state=kept)


OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def tensors_of(model, optimizer):
    """Model and optimizer as flat names to tensors, which is all that safetensors holds."""
    weights, state = get_state_dict(model, optimizer, options=OPTIONS)
    plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {**weights, **tensors}, plain, weights.keys()


def save(rank, layout, rule, folder):
    model, optimizer = build(layout, rule)
    learn([model], optimizer, 0, 2)
    tensors, _, _ = tensors_of(model, optimizer)
    writer = HuggingFaceStorageWriter(folder, save_distributed=dist.get_world_size() > 1)
    dcp.save(tensors, storage_writer=writer)
    learn([model], optimizer, 2, 4)
    return {name: p.tolist() for name, p in whole(model).items()}


def load(rank, layout, rule, folder):
    model, optimizer = build(layout, rule)
    tensors, plain, names = tensors_of(model, optimizer)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder))
    state = {**{k: v for k, v in tensors.items() if k not in names}, **plain}
    set_state_dict(
        model,
        optimizer,
        model_state_dict={k: tensors[k] for k in names},
        optim_state_dict=state,
        options=OPTIONS,
    )
    learn([model], optimizer, 2, 4)
    return {name: p.tolist() for name, p in whole(model).items()}


EVERY_PAIR = list(itertools.product(LAYOUTS, LAYOUTS))
# Each layout saves for the next but one, and three for themselves.
SOME_PAIRS = [([*LAYOUTS][i], [*LAYOUTS][i - len(LAYOUTS) + 2]) for i in range(len(LAYOUTS))]
SOME_PAIRS += [(layout, layout) for layout in ("fsdp x4", *OWNERS)]


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        pytest.param("dion of blocks", SOME_PAIRS, id="some"),
        *(pytest.param(rule, EVERY_PAIR, id=rule, marks=pytest.mark.slow) for rule in RULES),
    ],
)
def test_saved_anywhere_loaded_anywhere(rule, chosen, tmp_path):
    """Each layout saves, others load; the same layout goes on to the bit. One start of processes for all of a world."""

    def run(jobs):
        for world in (1, 2, 4):
            here = {key: job for key, job in jobs.items() if LAYOUTS[key[-1]][0] == world}
            yield from zip(here, run_processes(world, list(here.values())), strict=True)

    saves = {(layout,): (save, (layout, rule, str(tmp_path / layout))) for layout in LAYOUTS}
    uninterrupted = {layout: results[0] for (layout,), results in run(saves)}
    loads = {(start, to): (load, (to, rule, str(tmp_path / start))) for start, to in chosen}
    for (start, to), results in run(loads):
        for result in results:
            assert isinstance(result, dict), f"{start} -> {to}: {result}; {uninterrupted[start]}"
            for name, value in result.items():
                error = torch.tensor(value) - torch.tensor(uninterrupted[start][name])
                assert error.abs().max() <= (0 if start == to else 1e-9), f"{start} -> {to}: {name}"


def saved_by_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def saved_in_the_background(state):
    """Read back in the order it was written; the file is of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = {f"{i}.{k}": v for i, held in state["state"].items() for k, v in held.items()}
        dcp.async_save(tensors, checkpoint_id=shared(folder)).result()
        read = {key: torch.zeros_like(value) for key, value in tensors.items()}
        dcp.load(read, checkpoint_id=shared(folder))
        found = {i: {k: read[f"{i}.{k}"] for k in held} for i, held in state["state"].items()}
        dist.barrier()
    return {**state, "state": found}


def shared(folder):
    """Rank 0's folder."""
    folders = [folder]
    dist.broadcast_object_list(folders)
    return folders[0]


COPIES = {
    "torch.save": saved_by_torch,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "async_save": saved_in_the_background,
}


def exchanged(held, key):
    """The local piece, as hosts do that cannot move a DTensor itself."""
    if hasattr(held[key], "to_local"):
        held[key]._local_tensor = held[key]._local_tensor.clone()


def moved_within(held, key):
    if hasattr(held[key], "to_local"):
        held[key]._local_tensor.data = held[key]._local_tensor.data.clone()


def replaced(held, key):
    held[key] = held[key].to(dtype=held[key].dtype, copy=True)


def uneven(kind):
    """Some rows that two ranks share unequally, and some that one has alone."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 5), nn.Linear(5, 1), nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)]
    model = nn.Sequential(*layers).double()
    fully_shard(model)
    return model, kind(model.parameters() if kind is torch.optim.AdamW else model, lr=0.05)


def copied_and_moved(rank, kind):
    """By which means the state was not what it would have been, left alone."""
    model, optimizer = uneven(kind)
    learn([model], optimizer, 0, 3)
    saved = {name: make(optimizer.state_dict()) for name, make in COPIES.items()}
    weights = copy.deepcopy(model.state_dict())
    learn([model], optimizer, 3, 6)
    expected, wrong = list(model.parameters()), []
    for name, state in saved.items():
        other, resumed = uneven(kind)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        learn([other], resumed, 3, 6)
        if not all(map(same, expected, other.parameters())):
            wrong.append(name)
    for move in (exchanged, moved_within, replaced):
        other, resumed = uneven(kind)
        learn([other], resumed, 0, 3)
        memory = [
            weakref.ref(v.to_local().untyped_storage())
            for held in resumed.state.values()
            for v in held.values()
            if hasattr(v, "to_local")
        ]
        if rank or move is not replaced:  # or on one rank only
            for held in resumed.state.values():
                for key in held:
                    move(held, key)
            if kind is not torch.optim.AdamW and any(ref() for ref in memory):
                wrong.append(f"{move.__name__} leaves memory behind")
        learn([other], resumed, 3, 6)
        if not all(map(same, expected, other.parameters())):
            wrong.append(move.__name__)
    return wrong


def same(p, q):
    return torch.equal(local_of(p), local_of(q))


def test_sharded_state_is_copied_and_moved_by_every_means():
    """By all that works for the DTensors of torch.optim.AdamW."""
    kinds = (torch.optim.AdamW, Dion, Muon)
    for kind, results in zip(kinds, run_processes(2, [(copied_and_moved, (kind,)) for kind in kinds]), strict=True):
        assert results == [[], []], f"{kind.__name__}: {results}"
