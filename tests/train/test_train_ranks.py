"""Many ranks train as one does: the same losses whatever the cut, and checkpoints that load in any other cut."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from train_kit import losses, tiny_config

from orthoshard.train import vault
from orthoshard.train.config import OptimizerConfig, TrainConfig
from orthoshard.train.loop import LAST, train

sys.path.append(str(Path(__file__).parents[1] / "layouts"))
import itertools

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
}
STEPS, HALF = 10, 6


def world(cut: str) -> int:
    dp, fsdp, tp = CUTS[cut]
    return dp * fsdp * tp


def settings(text: Path, cut: str, steps: int = STEPS, optimizer: str = "dion") -> TrainConfig:
    config = tiny_config(text, steps=steps, batch=4, checkpoint_every=HALF, validate_every=5)
    config = replace(config, optimizer=OPTIMIZERS[optimizer], schedule=replace(config.schedule, decay="none"))
    dp, fsdp, tp = CUTS[cut]
    return replace(config, machine=replace(config.machine, dp=dp, fsdp=fsdp, tp=tp))


def run(rank: int, config: TrainConfig, folder: Path, resume: int | None = None) -> list[float]:
    """What a rank knows of the losses; all ranks know the same."""
    return losses(train(config, folder, resume=resume).events)


def copy_half(source: Path, target: Path) -> None:
    """The run as it was at its checkpoint of step HALF."""
    import shutil

    shutil.copytree(source, target)
    for step in vault.steps(target / "checkpoints"):
        if step > HALF:
            shutil.rmtree(target / "checkpoints" / vault.name_of(step))


def together(cut: str, jobs: list[tuple]) -> list[list[float]]:
    """Each job's losses; one process runs in this one. Fails where ranks disagree."""
    if world(cut) == 1:
        return [function(0, *args) for function, args in jobs]
    found = []
    for results in run_processes(world(cut), jobs):
        for result in results:
            assert isinstance(result, list), result
            assert result == results[0]
        found.append(results[0])
    return found


def worst(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) > STEPS
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """By optimizer the run of one process: its folder and its losses."""
    root = tmp_path_factory.mktemp("whole")
    return {name: (root / name, run(0, settings(text, "one", optimizer=name), root / name)) for name in OPTIMIZERS}


@pytest.mark.parametrize("cuts", [("dp 2", "fsdp 2", "tp 2"), ("dp 4", "fsdp 2, tp 2", "dp 2, fsdp 2", "dp 2, tp 2")])
def test_every_cut_trains_and_resumes_as_one_process_does(
    cuts: tuple[str, ...], text: Path, tmp_path: Path, whole: dict[str, tuple[Path, list[float]]]
) -> None:
    """A whole run in each cut; from its checkpoint the same cut goes on bit for bit, and from that of one process, and
    of another cut, within rounding."""
    source, expected = whole["dion"]
    jobs = []
    for cut in cuts:
        jobs.append((run, (settings(text, cut), tmp_path / cut)))
        jobs.append((resumed, (settings(text, cut), tmp_path / cut, tmp_path / f"{cut}, again")))
        jobs.append((resumed, (settings(text, cut), source, tmp_path / f"{cut}, from one")))
    pairs = list(itertools.pairwise(cuts))
    for saved, cut in pairs:
        jobs.append((resumed, (settings(text, cut), tmp_path / saved, tmp_path / f"{cut}, from {saved}")))
    found = together(cuts[0], jobs)
    for i, cut in enumerate(cuts):
        straight, again, from_one = found[3 * i : 3 * i + 3]
        assert worst(straight, expected) < 1e-3, cut
        assert again == straight, cut
        assert worst(from_one, expected) < 1e-3, cut
        # One process goes on from what many ranks saved.
        copy_half(tmp_path / cut, tmp_path / f"one, from {cut}")
        assert worst(run(0, settings(text, "one"), tmp_path / f"one, from {cut}", LAST), expected) < 1e-3, cut
    for (saved, cut), curve in zip(pairs, found[3 * len(cuts) :], strict=True):
        assert worst(curve, expected) < 1e-3, f"{cut} from {saved}"


def resumed(rank: int, config: TrainConfig, source: Path, target: Path) -> list[float]:
    import torch.distributed as dist

    if rank == 0:
        copy_half(source, target)
    dist.barrier()
    return run(rank, config, target, LAST)
