"""The loop: resuming repeats the uninterrupted run bit by bit, bad gradients leave no trace, accumulation is exact."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from train_kit import losses, tensors_sha256, tiny_config, write_text

from orthoshard import clip_grad_norm_
from orthoshard.lab.train import atomic_dir, loop, record
from orthoshard.lab.train.config import OptimizerConfig, TrainConfig
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.loop import LAST, Result, train

OPTIMIZERS = {
    "dion": OptimizerConfig("dion", rank_fraction=0.25),
    "dion, lion": OptimizerConfig("dion", rank_fraction=1.0, scalar="lion"),
    "muon": OptimizerConfig("muon", nesterov=True),
    "adamw": OptimizerConfig("adamw", lr=3e-3, scalar_lr=0.012, weight_decay=0.1),
}


def weights(result: Result) -> list[Tensor]:
    return list(result.model.state_dict().values())


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [2, 4])
def test_resume_is_bit_exact(name: str, at: int, text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, steps=6, optimizer=OPTIMIZERS[name])
    whole = train(config, tmp_path / "whole")
    steps = iter(range(1, 7))
    part = train(config, tmp_path / "part", stop=lambda: next(steps) > at)
    assert (part.status, part.step) == ("stopped", at)
    peak = max(event["lr"] for event in whole.events if event["kind"] == "step")
    assert peak == OPTIMIZERS[name].lr or name != "adamw", "the rate of the matrices is the one recorded"
    torch.manual_seed(12345)  # of the global generator nothing is remembered
    again = train(config, tmp_path / "part", resume=LAST)
    assert losses(again.events) == losses(whole.events)
    assert losses(record.read(tmp_path / "part")) == losses(record.read(tmp_path / "whole"))
    assert equal(weights(again), weights(whole))
    last = f"checkpoints/{atomic_dir.name_of(6)}"
    assert tensors_sha256(tmp_path / "part" / last) == tensors_sha256(tmp_path / "whole" / last)


def test_a_finished_run_that_is_resumed_changes_nothing_and_may_go_further(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, steps=6)
    whole = train(config, tmp_path)
    again = train(config, tmp_path, resume=LAST)
    assert losses(again.events) == losses(whole.events)
    assert equal(weights(again), weights(whole))
    longer = replace(config, schedule=replace(config.schedule, steps=8))
    assert train(longer, tmp_path, resume=LAST).step == 8


def test_settings_of_a_resumed_run_are_the_new_ones(text: Path, tmp_path: Path) -> None:
    """Momentum and decay are group values, which a checkpoint would bring back: the flags have to win."""
    config = tiny_config(text, steps=6, optimizer=OptimizerConfig("muon", weight_decay=0.0))
    train(config, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    lasts = []
    for name, decay in (("a", 0.0), ("b", 5.0)):
        changed = replace(
            config,
            schedule=replace(config.schedule, steps=9),
            optimizer=replace(config.optimizer, weight_decay=decay),
        )
        lasts.append(train(changed, tmp_path / name, resume=LAST))
    norms = [sum(float(w.norm()) for w in weights(last)) for last in lasts]
    assert norms[1] < norms[0]


def test_killed_before_the_first_checkpoint_starts_over(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, checkpoint_every=0)
    whole = train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints")
    lines = (tmp_path / "part" / record.NAME).read_bytes().splitlines(keepends=True)
    for left in (0, 1, 4):
        (tmp_path / "part" / record.NAME).write_bytes(b"".join(lines[:left]) + b'{"kind": "st')
        assert losses(train(config, tmp_path / "part", resume=LAST).events) == losses(whole.events)
        shutil.rmtree(tmp_path / "part/checkpoints")


def test_a_record_whose_checkpoints_are_gone_is_kept(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text)
    train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / record.NAME).read_bytes()
    with pytest.raises(UserError, match="there is no checkpoint"):
        train(config, tmp_path, resume=LAST)
    assert (tmp_path / record.NAME).read_bytes() == before


def test_existing_run_is_refused(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, steps=2)
    train(config, tmp_path)
    before = (tmp_path / record.NAME).read_bytes()
    with pytest.raises(UserError, match="already holds"):
        train(config, tmp_path)
    (tmp_path / record.NAME).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="already holds checkpoints"):
        train(config, tmp_path)
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_run_that_is_going_on_is_left_alone(text: Path, tmp_path: Path) -> None:
    """Nobody resumes it meanwhile; and what it appends stands at the end, whoever else shortened the file."""
    config, said = tiny_config(text), []

    def meanwhile() -> bool:
        for resume in (LAST, 2):
            before = (tmp_path / record.NAME).read_bytes()
            with pytest.raises(UserError, match=r"another process trains in .*; wait for it, or give another --out"):
                train(config, tmp_path, resume=resume)
            said.append((tmp_path / record.NAME).read_bytes() == before)
        return False

    whole = train(config, tmp_path, stop=meanwhile)
    assert said == [True] * 12
    assert losses(record.read(tmp_path)) == losses(whole.events)
    assert not list((tmp_path / "checkpoints").glob("set-aside*"))


def test_it_learns(text: Path, tmp_path: Path) -> None:
    result = train(tiny_config(text, steps=30, batch=8, checkpoint_every=0, validate_every=10), tmp_path)
    values = [loss for _, loss in result.validations]
    assert [step for step, _ in result.validations] == [0, 10, 20, 30]
    assert values[0] == pytest.approx(torch.log(torch.tensor(300.0)).item(), abs=0.2)  # knows nothing yet
    assert values[-1] < values[0] - 1
    assert 0 < result.optimizer_seconds < result.seconds
    assert result.events[-1]["state_bytes"] > 0


def gradients(config: TrainConfig, folder: Path) -> list[Tensor]:
    """Of step 0, by a model whose optimizer never gets to step."""
    run = loop._Run(config, folder)
    run.optimizer.step = lambda closure=None: None
    run.optimizer.zero_grad = lambda set_to_none=True: None
    run.step(0)
    return [p.grad for p in run.model.parameters() if p.grad is not None]


def test_accumulation_is_the_big_batch(text: Path, tmp_path: Path) -> None:
    big = gradients(tiny_config(text, batch=8, accumulate=1, clip=0.0), tmp_path)
    small = gradients(tiny_config(text, batch=2, accumulate=4, clip=0.0), tmp_path)
    assert len(big) == len(small) > 10
    for a, b in zip(big, small, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """Put ``value`` into one gradient entry of each of these steps (from 0), just before clipping."""
    calls = iter(range(10**6))

    def bad(parameters: object, max_norm: float, process_group: object) -> torch.Tensor:
        held = list(parameters)
        if next(calls) in steps:
            held[3].grad.view(-1)[5] = value
        return clip_grad_norm_(held, max_norm, process_group)

    monkeypatch.setattr(loop, "clip_grad_norm_", bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["dion", "muon", "adamw"])
def test_bad_batch_is_as_if_it_had_not_been(
    name: str, value: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(text, steps=6, checkpoint_every=0, optimizer=OPTIMIZERS[name])
    # The oracle never sees step 2 at all: no gradient, no optimizer step.
    oracle = loop._Run(config, tmp_path / "oracle")
    for step in (0, 1, 3, 4, 5):
        oracle.step(step)
    poison(monkeypatch, {2}, value)
    result = train(config, tmp_path / "poisoned")
    assert equal(weights(result), list(oracle.model.state_dict().values()))
    steps = [event for event in result.events if event["kind"] == "step"]
    assert [event["skipped"] for event in steps] == [False, False, True, False, False, False]
    assert record.read(tmp_path / "poisoned")[4]["grad_norm"] is None  # run, validation, step 1, step 2, step 3


def test_too_many_bad_batches_stop_the_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(text, steps=20, checkpoint_every=1, max_skipped=2)
    poison(monkeypatch, {1, 2, 4, 5, 6, 7, 8})
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row.*checkpoint of step 4 is kept"):
        train(config, tmp_path)
    assert atomic_dir.steps(tmp_path / "checkpoints") == [1, 4]  # none was taken while gradients were bad
    events = record.read(tmp_path)
    assert [e["step"] for e in events if e["kind"] == "step" and e["skipped"]] == [2, 3, 5, 6, 7]
    monkeypatch.undo()
    good = train(tiny_config(text, steps=20, checkpoint_every=1, max_skipped=2), tmp_path, resume=LAST)
    assert good.step == 20


def test_zero_skips_allowed_stops_at_the_first(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {0})
    with pytest.raises(UserError, match=r"at step 1\. There is no checkpoint yet"):
        train(tiny_config(text, max_skipped=0), tmp_path)


def leaves(*rows: list[float]) -> list[nn.Parameter]:
    made = []
    for row in rows:
        parameter = nn.Parameter(torch.zeros(len(row)))
        parameter.grad = torch.tensor(row)
        made.append(parameter)
    return made


def test_clip_agrees_with_torch() -> None:
    for max_norm in (0.5, 100.0):
        ours, theirs = leaves([3.0, 4.0], [12.0]), leaves([3.0, 4.0], [12.0])
        assert clip_grad_norm_(ours, max_norm).item() == pytest.approx(13.0)
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_clip_leaves_a_bad_gradient_as_it_is() -> None:
    for bad in (float("nan"), float("inf")):
        held = leaves([3.0, 4.0], [bad, 1.0])
        clip_grad_norm_(held, 0.5)
        assert held[0].grad.tolist() == [3.0, 4.0]
        assert held[1].grad[1] == 1.0


def test_clip_survives_a_norm_that_overflows() -> None:
    held = leaves([3e38], [-1e38])
    assert clip_grad_norm_(held, 2.0).item() == pytest.approx(10**0.5 * 1e38)
    expected = torch.tensor([3.0, -1.0]) / torch.tensor(10.0).sqrt() * 2
    torch.testing.assert_close(torch.cat([p.grad for p in held]), expected)


def test_corpus_shorter_than_one_batch(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path / "text.txt", words=60), batch=500)
    with pytest.raises(UserError, match=r"one step takes 500 sequences of 16; give more text, or a smaller --batch"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_shorter_than_a_sequence(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path / "text.txt", words=60))
    config = replace(config, model=replace(config.model, context=16), data=replace(config.data, held_out=0.01))
    with pytest.raises(UserError, match="fewer than one sequence of 16"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sinks_get_what_the_record_gets(text: Path, tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []
    result = train(tiny_config(text), tmp_path, sinks=[seen.append])
    assert seen == result.events
    assert [e["kind"] for e in seen] == [e["kind"] for e in record.read(tmp_path)]
