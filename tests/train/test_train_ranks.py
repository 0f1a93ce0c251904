"""Many ranks train as one does: the same losses whatever the cut, and checkpoints that load in any other cut."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from train_kit import losses, tiny_config

from orthoshard import clip_grad_norm_
from orthoshard.lab.train import atomic_dir, checkpoint, record
from orthoshard.lab.train.config import OptimizerConfig, TrainConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import LAST, train
from processes import run_processes

# (dp, fsdp, tp)
CUTS = {
    "one": (1, 1, 1),
    "dp 2": (2, 1, 1),
    "fsdp 2": (1, 2, 1),
    "tp 2": (1, 1, 2),
    "fsdp 2, tp 2": (1, 2, 2),
    "dp 2, fsdp 2": (2, 2, 1),
    "dp 2, tp 2": (2, 1, 2),
    "dp 4": (4, 1, 1),
    "fsdp 4": (1, 4, 1),
}
OPTIMIZERS = {
    "dion": OptimizerConfig("dion", rank_fraction=0.25),
    "muon": OptimizerConfig("muon"),
    "adamw": OptimizerConfig("adamw"),
    "dion, owners": OptimizerConfig("dion", rank_fraction=0.25, option=("shard_state=zero1",)),
}
STEPS, HALF = 6, 4


def world(cut: str) -> int:
    dp, fsdp, tp = CUTS[cut]
    return dp * fsdp * tp


def settings(text: Path, cut: str, steps: int = STEPS, optimizer: str = "dion") -> TrainConfig:
    config = tiny_config(text, steps=steps, batch=4, checkpoint_every=HALF, validate_every=3)
    config = replace(config, optimizer=OPTIMIZERS[optimizer], schedule=replace(config.schedule, decay="none"))
    dp, fsdp, tp = CUTS[cut]
    return replace(config, machine=replace(config.machine, dp=dp, fsdp=fsdp, tp=tp))


def run(rank: int, config: TrainConfig, folder: Path, resume: int | None = None) -> list[float]:
    """What a rank knows of the losses and of the gradients' norms; all ranks know the same."""
    events = train(config, folder, resume=resume).events
    return losses(events) + [event["grad_norm"] for event in events if event["kind"] == "step"]


def resumed(rank: int, config: TrainConfig, source: Path, target: Path) -> list[float]:
    """The same from the checkpoint of step HALF of another run."""
    if rank == 0:
        shutil.copytree(source, target)
        for step in atomic_dir.steps(target / "checkpoints"):
            if step > HALF:
                shutil.rmtree(target / "checkpoints" / atomic_dir.name_of(step))
    if dist.is_initialized():
        dist.barrier()
    return run(rank, config, target, LAST)


def together(ranks: int, jobs: list[tuple]) -> list[list[float]]:
    """Each job's figures; one process runs in this one. Fails where ranks disagree."""
    if ranks == 1:
        return [function(0, *args) for function, args in jobs]
    found = []
    for results in run_processes(ranks, jobs):
        for result in results:
            assert isinstance(result, list), result
            assert result == results[0]
        found.append(results[0])
    return found


def worst(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) > 2 * STEPS
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """By optimizer the run of one process: its folder and its figures."""
    root = tmp_path_factory.mktemp("whole")
    return {name: (root / name, run(0, settings(text, "one", optimizer=name), root / name)) for name in OPTIMIZERS}


@pytest.mark.parametrize(
    ("cuts", "optimizer"),
    [
        (("dp 2", "tp 2"), "dion"),
        pytest.param(("dp 2", "fsdp 2", "tp 2"), "dion", marks=pytest.mark.slow),
        (("fsdp 2, tp 2",), "dion"),
        pytest.param(("fsdp 2, tp 2", "dp 2, fsdp 2"), "dion", marks=pytest.mark.slow),
        pytest.param(("dp 2", "fsdp 2", "tp 2"), "muon", marks=pytest.mark.slow),
        pytest.param(("dp 2", "fsdp 2", "tp 2"), "adamw", marks=pytest.mark.slow),
        pytest.param(("dp 4", "dp 2, tp 2", "fsdp 4"), "dion", marks=pytest.mark.slow),
        pytest.param(("fsdp 2, tp 2", "dp 2, fsdp 2"), "muon", marks=pytest.mark.slow),
        pytest.param(("dp 4", "dp 2, fsdp 2"), "dion, owners", marks=pytest.mark.slow),
    ],
)
def test_every_cut_trains_and_resumes_as_one_process_does(
    cuts: tuple[str, ...], optimizer: str, text: Path, tmp_path: Path, whole: dict[str, tuple[Path, list[float]]]
) -> None:
    """A whole run in each cut; from its checkpoint the same cut goes on bit for bit, and one process within rounding;
    from the checkpoint of one process, and of the next cut, it goes on within rounding too."""
    source, expected = whole[optimizer]
    config = {cut: settings(text, cut, optimizer=optimizer) for cut in (*cuts, "one")}
    folders = {cut: tmp_path / cut for cut in cuts}
    sources = {cut: [folders[cut], source] for cut in cuts}
    for saved, cut in itertools.pairwise(cuts):
        sources[cut].append(folders[saved])
    jobs = [(run, (config[cut], folders[cut])) for cut in cuts]
    jobs += [
        (resumed, (config[cut], found, tmp_path / f"{cut}, {number}"))
        for cut in cuts
        for number, found in enumerate(sources[cut])
    ]
    figures = iter(together(world(cuts[0]), jobs))
    straight = {cut: next(figures) for cut in cuts}
    for cut in cuts:
        assert worst(straight[cut], expected) < 1e-3, cut
        assert next(figures) == straight[cut], f"{cut} from its own checkpoint"
        for found in sources[cut][1:]:
            assert worst(next(figures), expected) < 1e-3, f"{cut} from {found.name}"
        one = resumed(0, config["one"], folders[cut], tmp_path / f"one, from {cut}")
        assert worst(one, expected) < 1e-3, f"one process from {cut}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_checkpoint_loads_in_every_cut(
    text: Path, tmp_path: Path, whole: dict[str, tuple[Path, list[float]]]
) -> None:
    expected = whole["dion"][1]
    worlds = {ranks: [cut for cut in CUTS if world(cut) == ranks] for ranks in (1, 2, 4)}
    straight: dict[str, list[float]] = {}
    for ranks, cuts in worlds.items():
        runs = together(ranks, [(run, (settings(text, cut), tmp_path / cut)) for cut in cuts])
        straight |= zip(cuts, runs, strict=True)
    for b in CUTS:
        jobs = [(resumed, (settings(text, b), tmp_path / a, tmp_path / f"{b}, from {a}")) for a in CUTS]
        for a, figures in zip(CUTS, together(world(b), jobs), strict=True):
            assert figures == straight[b] if a == b else worst(figures, expected) < 1e-3, f"{b} from {a}"


def full_disk(rank: int, config: TrainConfig, folder: Path) -> str:
    """Rank 1 alone cannot write its part of the second checkpoint."""
    save = checkpoint.save_pieces

    def refused(target: Path, pieces: object, group: object) -> None:
        save(target, pieces, group)
        if rank == 1 and "step-000006" in target.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save_pieces = refused
    try:
        train(config, folder)
    except UserError as error:
        return str(error)
    finally:
        checkpoint.save_pieces = save
    return "no error"


def test_a_checkpoint_that_one_rank_cannot_write(text: Path, tmp_path: Path) -> None:
    """All end with a sentence, the checkpoint before is kept whole, and nothing half-written is left."""
    config = replace(settings(text, "fsdp 2"), record=replace(settings(text, "one").record, checkpoint_every=3))
    (results,) = run_processes(2, [(full_disk, (config, tmp_path / "run"))])
    assert "is full; the checkpoint of step 6 was not written. The checkpoint of step 3 is kept" in results[1]
    assert results[0].startswith("rank 1 failed: OSError")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000003"]
    atomic_dir.verify(tmp_path / "run/checkpoints/step-000003", 3)
    assert max(e["step"] for e in record.read(tmp_path / "run") if e["kind"] == "checkpoint") == 3


def clipped(rank: int, rows: list[list[list[float]]], max_norm: float) -> tuple[float, list[list[list[float]]]]:
    """Gradients on three layouts of a 2 x 2 mesh, and one that is plain; returns the norm and whole gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    places = [
        (mesh, (Shard(0), Shard(1))),
        (mesh["fsdp"], (Shard(0),)),
        (mesh, (Replicate(), Shard(0))),
        None,
    ]
    parameters = []
    for values, place in zip(rows, places, strict=True):
        gradient = torch.tensor(values)
        if place is not None:
            gradient = distribute_tensor(gradient, *place)
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        parameters.append(parameter)
    norm = clip_grad_norm_(parameters, max_norm).item()
    whole = [p.grad.full_tensor() if place else p.grad for p, place in zip(parameters, places, strict=True)]
    return norm, [gradient.tolist() for gradient in whole]


def test_clipping_of_gradients_on_several_meshes() -> None:
    plain = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, -6.0], [0.5, 1.0], [2.0, 2.0]], [[7.0], [1.0], [0.0]], [[-8.0, 1.0]]]
    large = [[[x * 1e38 / 3 for x in row] for row in matrix] for matrix in plain]
    bad = [*plain[:2], [[7.0], [float("nan")], [0.0]], plain[3]]
    cases = [(plain, 0.5), (plain, 100.0), (large, 2.0), (bad, 0.5)]
    for (rows, max_norm), results in zip(cases, run_processes(4, [(clipped, case) for case in cases]), strict=True):
        held = [nn.Parameter(torch.zeros_like(torch.tensor(values))) for values in rows]
        for parameter, values in zip(held, rows, strict=True):
            parameter.grad = torch.tensor(values)
        expected = clip_grad_norm_(held, max_norm).item()
        for result in results:
            assert not isinstance(result, str), result
            norm, gradients = result
            assert norm == results[0][0] or rows is bad
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0, equal_nan=True)
            for gradient, parameter in zip(gradients, held, strict=True):
                torch.testing.assert_close(torch.tensor(gradient), parameter.grad, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("cut", "ranks"), [pytest.param("dp 2", 2, marks=pytest.mark.slow), ("dp 2, fsdp 2", 4)])
def test_replicas_that_exchange_factors_train_as_one_process_does(
    cut: str, ranks: int, text: Path, tmp_path: Path
) -> None:
    """Unclipped, for a clipped norm is a bound there; resumed to the bit, and by one process within rounding."""

    def unclipped(cut: str) -> TrainConfig:
        config = settings(text, cut)
        return replace(config, schedule=replace(config.schedule, clip=0.0))

    def apart(found: list[float]) -> float:
        """Of losses alone: replicas know the norms of their own gradients."""
        pairs = list(zip(found, expected, strict=True))[:-STEPS]
        assert len(pairs) > STEPS
        return max(abs(a - b) for a, b in pairs)

    expected = run(0, unclipped("one"), tmp_path / "one")
    config = unclipped(cut)
    config = replace(config, machine=replace(config.machine, replica_sync="factors"))
    jobs = [
        (run, (config, tmp_path / "factors")),
        (resumed, (config, tmp_path / "factors", tmp_path / "again")),
        (resumed, (config, tmp_path / "one", tmp_path / "from one")),
    ]
    straight, again, from_one = together(ranks, jobs)
    assert apart(straight) < 1e-4
    assert again == straight
    assert apart(from_one) < 1e-4
    alone = resumed(0, unclipped("one"), tmp_path / "factors", tmp_path / "alone")
    assert apart(alone) < 1e-4
