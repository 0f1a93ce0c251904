"""A run's identity, and its outcome from its record."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from compare_fakes import make_outcome

from orthoshard.lab.compare import job as jobs
from orthoshard.lab.compare.grid import Spot
from orthoshard.lab.compare.rivals import DEFAULT, Rival
from orthoshard.lab.compare.worker import gave_up
from orthoshard.lab.train.config import (
    MachineConfig,
    ModelConfig,
    OptimizerConfig,
    RecordConfig,
    ScheduleConfig,
    TrainConfig,
)

ADAMW = DEFAULT[0]
DION = replace(DEFAULT[4], config=replace(DEFAULT[4].config, lr=0.02, scalar_lr=0.006))


def test_different_runs_have_different_folders():
    base = TrainConfig()
    longer = replace(base, schedule=ScheduleConfig(steps=301))
    rivals = [replace(rival, config=replace(rival.config, scalar_lr=0.01)) for rival in DEFAULT]
    spots = [Spot(k, j, seed) for k in (-1, 0, 1) for j in (0, 1) for seed in (0, 1)]
    folders = [jobs.make(rival, spot, b).folder for rival in rivals for spot in spots for b in (base, longer)]
    assert len(set(folders)) == len(folders) == 12 * 2 * len(DEFAULT)
    assert all("/" not in name for name in folders)


def test_labels_that_a_file_name_cannot_tell_apart_have_different_folders():
    one, two = replace(DION, label="dion 1/4"), replace(DION, label="dion 1:4")
    assert jobs.make(one, Spot(0, 0, 0), TrainConfig()).folder != jobs.make(two, Spot(0, 0, 0), TrainConfig()).folder


def test_threads_do_not_make_another_run():
    base = TrainConfig()
    two = replace(base, machine=MachineConfig(threads=2))
    assert jobs.make(DION, Spot(0, 0, 0), base).folder == jobs.make(DION, Spot(0, 0, 0), two).folder


def test_folders_keep_the_names_they_had_so_that_runs_on_disks_are_found():
    """A name from experiments/dion_tail's comparison of width 256, made before later settings came. A new setting must
    be left out of the name while it has its default."""
    config = OptimizerConfig(name="muon", lr=0.02, scale="spectral", weight_decay=0.01, nesterov=True, scalar_lr=3e-3)
    base = TrainConfig(model=ModelConfig(name="small"), schedule=ScheduleConfig(steps=250))
    assert jobs.make(Rival("muon", config), Spot(0, 0, 0), base).folder == "muon-lr0.02-seed0-91a9939a"
    silent = replace(base, record=RecordConfig(validate_every=7, sample_tokens=0))
    assert jobs.make(Rival("muon", config), Spot(0, 0, 0), silent).folder == "muon-lr0.02-seed0-91a9939a"


def test_a_job_has_its_learning_rate_and_seed():
    made = jobs.make(ADAMW, Spot(-2, 0, 7), TrainConfig())
    assert made.lr == ADAMW.config.lr / 4
    assert made.config.seed == 7
    assert made.config.optimizer.name == "adamw"


def step(number, **changes):
    event = {"kind": "step", "step": number, "loss": 6.0 - number, "seconds": 1.0, "optimizer_seconds": 0.1}
    return event | {"skipped": False} | changes


EVENTS = [
    {"kind": "run", "step": 0, "data": {"digest": "d"}, "machine": {}, "versions": {}},
    {"kind": "validation", "step": 0, "loss": 1.0},
    step(1, seconds=9.0, optimizer_seconds=5.0),
    step(2),
    {"kind": "validation", "step": 2, "loss": 4.0},
    step(3, seconds=3.0, optimizer_seconds=0.3),
    step(4, loss=None),
    {"kind": "validation", "step": 4, "loss": 4.5},
    {"kind": "finished", "step": 4, "state_bytes": 123},
]


def test_both_rates_double():
    made = jobs.make(DION, Spot(1, 2, 0), TrainConfig())
    assert (made.lr, made.scalar_lr, made.rates) == (0.04, 0.024, "lr 0.04, scalar lr 0.024")


def test_an_outcome_from_its_record():
    found = jobs.outcome(jobs.make(DION, Spot(1, 0, 0), TrainConfig()), "finished", EVENTS, 20.0)
    assert found.loss == 4.0, "the best after a step, neither the last nor that of the first weights"
    assert found.elapsed == [0, 9, 10, 13, 14]
    assert found.optimizer_ms == 100.0, "the median without the first step, which makes the state"
    assert found.step_ms == 1000.0
    assert found.train == [(1, 5.0), (2, 4.0), (3, 3.0), (4, math.inf)]
    assert (found.state_bytes, found.lr, found.k, found.digest) == (123, 0.04, 1, "d")


def test_a_run_that_ends_without_a_finite_loss_diverged():
    events = [*EVENTS[:-2], {"kind": "validation", "step": 4, "loss": None}, EVENTS[-1]]
    found = jobs.outcome(jobs.make(DION, Spot(1, 0, 0), TrainConfig()), "finished", events, 20.0)
    assert found.status == "diverged"
    assert found.loss == math.inf


def test_outcomes_survive_the_disk(tmp_path: Path):
    found = make_outcome(validations=[(0, 7.0), (2, math.inf)], train=[(1, math.inf)], status="diverged")
    path = tmp_path / "result.json"
    jobs.save(path, found)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert jobs.load(path) == found


@pytest.mark.parametrize("text", ["", "{", "[]", '{"label": "x"}', "null"])
def test_a_damaged_result_counts_as_none(tmp_path: Path, text):
    (tmp_path / "result.json").write_text(text)
    assert jobs.load(tmp_path / "result.json") is None
    assert jobs.load(tmp_path / "nothing") is None


def test_gave_up_needs_the_bad_gradients_in_a_row_at_the_end():
    bad = [step(k, skipped=True) for k in range(3)]
    assert gave_up(bad, 2)
    assert not gave_up(bad, 3)
    assert not gave_up([*bad, step(4)], 2)
    assert not gave_up([bad[0], step(2), bad[1], bad[2]], 2)
    assert not gave_up([], 0)
