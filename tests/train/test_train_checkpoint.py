"""Checkpoints: whole or not there, trusted only when every byte is what was written, and never pickle."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kill_runs import die_at
from train_kit import tiny_config

from orthoshard.lab.train import atomic_dir, checkpoint, record
from orthoshard.lab.train.config import ModelConfig, OptimizerConfig, TrainConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import LAST, train
from processes import run_processes


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(256)) * 3)
    (folder / "b.json").write_text('{"step": 1}\n')


def test_whole_and_verified(tmp_path: Path) -> None:
    folder = atomic_dir.write(tmp_path, 7, fill, keep=2)
    assert folder == tmp_path / "step-000007"
    assert sorted(p.name for p in folder.iterdir()) == ["a.bin", "b.json", atomic_dir.MANIFEST]
    atomic_dir.verify(folder, 7)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1000000, 1000001):
        atomic_dir.write(tmp_path, step, fill, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]
    assert atomic_dir.steps(tmp_path) == [1000000, 1000001]


def test_a_step_is_never_written_over(tmp_path: Path) -> None:
    folder = atomic_dir.write(tmp_path, 7, fill, keep=2)
    with pytest.raises(FileExistsError):
        atomic_dir.write(tmp_path, 7, lambda folder: None, keep=2)
    atomic_dir.verify(folder, 7)


def test_a_failed_write_leaves_nothing_new(tmp_path: Path) -> None:
    atomic_dir.write(tmp_path, 1, fill, keep=1)

    def fails(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_dir.write(tmp_path, 2, fails, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    atomic_dir.verify(tmp_path / "step-000001", 1)


def test_set_aside_keeps_everything(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        atomic_dir.write(tmp_path, step, fill, keep=3)
    atomic_dir.set_aside(tmp_path, after=1)
    assert atomic_dir.steps(tmp_path) == [1]
    atomic_dir.write(tmp_path, 2, fill, keep=3)
    atomic_dir.set_aside(tmp_path, after=1)
    names = {"step-000001", "set-aside-1-step-000002", "set-aside-2-step-000002", "set-aside-1-step-000003"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_killed_at_every_file_event(tmp_path: Path) -> None:
    """Two checkpoints are there and a third is written; the process dies before file event 1, 2, 3, ... of that.
    Each time the newest named folder is whole, none is lost but those beyond `keep`, and the next write succeeds."""
    number, outcomes = 0, []
    while True:
        number += 1
        parent = tmp_path / str(number)
        for step in (1, 2):
            atomic_dir.write(parent, step, fill, keep=2)
        pid = os.fork()
        if not pid:
            die_at(number, parent)
            atomic_dir.write(parent, 3, fill, keep=2)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        there = atomic_dir.steps(parent)
        for step in there:
            atomic_dir.verify(parent / atomic_dir.name_of(step), step)
        assert there in ([1, 2], [1, 2, 3], [2, 3])
        outcomes.append(there)
        after = max(there) + 1
        atomic_dir.write(parent, after, fill, keep=2)
        assert atomic_dir.steps(parent) == [after - 1, after]
        assert sorted(p.name for p in parent.iterdir()) == [atomic_dir.name_of(after - 1), atomic_dir.name_of(after)]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 15
    assert {tuple(there) for there in outcomes} == {(1, 2), (1, 2, 3), (2, 3)}


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of six steps with the checkpoints of steps 4 and 6."""
    config = tiny_config(text)
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config, folder)
    assert atomic_dir.steps(folder / "checkpoints") == [4, 6]
    return config, folder


@pytest.fixture
def copy(finished: tuple[TrainConfig, Path], tmp_path: Path) -> Path:
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(config: TrainConfig, folder: Path, *, offers: int | None = 4) -> str:
    """Resuming from the last checkpoint is refused in one sentence, with the offer, and changes no byte."""
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        train(config, folder, resume=LAST)
    said = str(caught.value)
    assert "\n" not in said
    assert (f"--resume-from {offers}" in said) == (offers is not None)
    assert snapshot(folder) == before
    return said


def rewrite(folder: Path, change: dict[str, object]) -> None:
    """A manifest as a forger would make it: consistent in itself."""
    path = folder / atomic_dir.MANIFEST
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


FILES = ("shard-00001-model-00001-of-00001.safetensors", checkpoint.PLAIN, atomic_dir.MANIFEST)


def test_what_a_checkpoint_holds(copy: Path) -> None:
    """No pickle, and plain values that anybody can read."""
    folder = copy / "checkpoints/step-000006"
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    plain = json.loads((folder / checkpoint.PLAIN).read_text())
    assert plain["step"] == 6
    assert plain["config"]["optimizer"]["name"] == "dion"
    assert {group["rule"] for group in plain["groups"]} == {"dion", "adamw"}
    assert all(group["lr"] > 0 and group["param_names"] for group in plain["groups"])


def test_numbers_and_small_tensors_survive(tmp_path: Path) -> None:
    """torch's SGD-like state with a Python number, a 0-d tensor and a bool; a group whose lr is a tensor."""

    class Counting(torch.optim.Optimizer):
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["calls"] = state.get("calls", 0) + 1
                    state["half"] = state["calls"] / 2 + 0.1
                    state["odd"] = state["calls"] % 2 == 1
                    state["small"] = torch.tensor(state["calls"] * 1.5)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(3, 2)
        return model, Counting(model.parameters(), {"lr": torch.tensor(0.5), "betas": (0.9, 0.95), "note": None})

    model, optimizer = make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    checkpoint.write(tmp_path, 3, checkpoint.capture(model, optimizer, {}), keep=2)
    other, loaded = make()
    checkpoint.restore(checkpoint.find(tmp_path, None), other, loaded)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    states = list(loaded.state.values())
    assert [(s["calls"], s["half"], s["odd"], s["small"].item()) for s in states] == [(3, 1.6, True, 4.5)] * 2
    assert loaded.param_groups[0]["betas"] == (0.9, 0.95)
    assert loaded.param_groups[0]["lr"].item() == 0.5


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(name: str, finished: tuple[TrainConfig, Path], copy: Path) -> None:
    folder = copy / "checkpoints/step-000006"
    good = (folder / name).read_bytes()
    rng = random.Random(name)
    places = range(len(good)) if len(good) < 600 else sorted(rng.sample(range(len(good)), 60))
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(bad)
        with pytest.raises(atomic_dir.Damaged):
            atomic_dir.verify(folder, 6)
    refused(finished[0], copy)


def a_pickle_more(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def a_name_that_leads_elsewhere(folder: Path) -> None:
    files = json.loads((folder / atomic_dir.MANIFEST).read_text())["files"]
    rewrite(folder, {"files": files | {"../run.jsonl": {"bytes": 1, "sha256": "0" * 64}}})


def of_somebody_else(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    torch.save({"model": 1}, folder / "pytorch_model.bin")


def manifest_of(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / atomic_dir.MANIFEST).write_bytes(content)


NO_MANIFEST = (b"", b"{}", b"[]", b"null", b'{"files": 3}', b"\xff", b"[" * 10000, b'{"files": {"a": 1}}')
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    *((lambda folder, name=name: (folder / name).unlink(), name) for name in FILES),
    *((lambda folder, name=name: os.truncate(folder / name, 1), name) for name in FILES),
    (a_pickle_more, "'.metadata'"),
    (a_name_that_leads_elsewhere, "'../run.jsonl'"),
    *((manifest_of(content), "that can be read") for content in NO_MANIFEST),
    (lambda folder: rewrite(folder, {"format": "something 99"}), "is in the format 'something 99'"),
    (lambda folder: rewrite(folder, {"step": 5}), "says it is of step 5"),
    (of_somebody_else, "orthoshard did not write it"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_damaged(
    damage: Callable[[Path], object], sentence: str, finished: tuple[TrainConfig, Path], copy: Path
) -> None:
    damage(copy / "checkpoints/step-000006")
    assert sentence in refused(finished[0], copy)


def test_all_damaged_offers_none(finished: tuple[TrainConfig, Path], copy: Path) -> None:
    for step in (4, 6):
        (copy / "checkpoints" / atomic_dir.name_of(step) / FILES[0]).write_bytes(b"")
    assert "no earlier one is whole" in refused(finished[0], copy, offers=None)


def test_a_step_that_is_not_there(finished: tuple[TrainConfig, Path], copy: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 5 .* it has 4, 6"):
        train(finished[0], copy, resume=5)


MISFITS = {
    "vocabulary": (lambda c: replace(c, data=replace(c.data, vocabulary=290)), "a vocabulary of 300 and the data has"),
    "data": (lambda c: replace(c, data=replace(c.data, held_out=0.2)), "was trained on other data"),
    "model": (lambda c: replace(c, model=ModelConfig("tiny", 16)), "model.model.embed_tokens.weight is (300, 64)"),
    "optimizer": (lambda c: replace(c, optimizer=OptimizerConfig("muon")), "does not fit this model in optimizer"),
    "more state": (lambda c: replace(c, optimizer=OptimizerConfig("adamw")), "lacks optimizer.state"),
    "rank": (lambda c: replace(c, optimizer=OptimizerConfig("dion", rank_fraction=0.5)), ".Q is (64, 16)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_of_something_else(case: str, finished: tuple[TrainConfig, Path], copy: Path) -> None:
    change, sentence = MISFITS[case]
    assert sentence in refused(change(finished[0]), copy, offers=None)


def test_wrong_dtype_is_refused(finished: tuple[TrainConfig, Path], copy: Path) -> None:
    """torch's loader would copy float16 into float32 without a word."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder = copy / "checkpoints/step-000006"
    path = folder / FILES[0]
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    name = "model.lm_head.weight"
    save_file(tensors | {name: tensors[name].half()}, path, notes)
    (folder / atomic_dir.MANIFEST).unlink()
    atomic_dir.seal(folder, 6)
    assert f"{name} is (300, 64) torch.float16" in refused(finished[0], copy, offers=None)


def limited(rank: int, text: Path, folder: Path, size: int, steps: int) -> str:
    """What a run says whose files may not grow beyond ``size`` bytes: what a full disk is to it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(UserError) as caught:
        train(tiny_config(text, steps=steps), folder, resume=LAST)
    return str(caught.value)


def test_disk_full_while_writing_a_checkpoint(finished: tuple[TrainConfig, Path], copy: Path, text: Path) -> None:
    before = snapshot(copy / "checkpoints")
    ((said,),) = run_processes(1, [(limited, (text, copy, 100_000, 8))])
    assert "the checkpoint of step 8 was not written" in said
    assert "the checkpoint of step 6 is kept" in said.lower()
    assert "\n" not in said
    assert snapshot(copy / "checkpoints") == before
    longer = replace(finished[0], schedule=replace(finished[0].schedule, steps=8))
    assert train(longer, copy, resume=LAST).step == 8


@pytest.mark.slow
def test_disk_full_while_writing_the_record(finished: tuple[TrainConfig, Path], copy: Path, text: Path) -> None:
    size = (copy / record.NAME).stat().st_size
    ((said,),) = run_processes(1, [(limited, (text, copy, size + 1300, 60))])
    assert "would grow beyond the size allowed here" in said
    assert "--resume" in said
    longer = replace(finished[0], schedule=replace(finished[0].schedule, steps=8))
    assert train(longer, copy, resume=LAST).step == 8


def test_unwritable_folder(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="give another folder with --out"):
        train(tiny_config(text), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


def test_folder_without_permission(text: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:
        locked = Path("/sys")  # where not even root may make a folder
    with pytest.raises(UserError, match=r"cannot be written to.*--out"):
        train(tiny_config(text), locked / "run")
