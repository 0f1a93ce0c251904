"""The table's logic against values computed by hand."""

import math

import pytest
from compare_fakes import make_outcome

from orthoshard.lab.compare.grid import Spot, State
from orthoshard.lab.compare.table import markdown, reach, rows, screen, seconds_at

DONE = State([], (0, 0))


@pytest.mark.parametrize(
    ("target", "step"),
    [
        (5.0, 20.0),  # exactly at a validation
        (4.5, 30.0),  # half-way from 5 at 20 to 4 at 40
        (4.0, 40.0),
        (6.5, 5.0),  # a quarter of the way from 7 at 0 to 5 at 20
        (8.0, 0.0),  # already there
        (3.9, None),
    ],
)
def test_reach_interpolates_between_validations(target, step):
    assert reach([(0, 7.0), (20, 5.0), (40, 4.0), (60, 4.4)], target) == step


def test_reach_takes_the_first_crossing_and_no_line_from_infinity():
    assert reach([(0, 7.0), (10, 4.0), (20, 6.0), (30, 3.0)], 5.0) == pytest.approx(10 * 2 / 3)
    assert reach([(0, math.inf), (10, 4.0)], 5.0) == 10
    assert reach([], 5.0) is None


def test_seconds_at_a_step_between_two():
    elapsed = [0.0, 2.0, 3.0, 4.0]
    assert [seconds_at(elapsed, step) for step in (0, 1, 1.5, 3, 9)] == [0, 2, 2.5, 4, 4]


def test_a_row_is_the_best_learning_rate_against_the_reference():
    outcomes = {
        "adamw": {
            Spot(-1, 0, 0): make_outcome(lr=0.05, k=-1, validations=[(0, 7.0), (4, 4.6)]),
            Spot(0, 0, 0): make_outcome(),  # 7, 5, 4 at steps 0, 2, 4
            Spot(1, 0, 0): make_outcome(lr=0.2, k=1, status="diverged"),
        },
        "muon": {
            Spot(0, 0, 0): make_outcome(
                label="muon", lr=0.02, validations=[(0, 7.0), (2, 4.5), (4, 3.5)], optimizer_ms=25.0, state_bytes=500
            )
        },
    }
    adamw, muon = rows(outcomes, {"adamw": DONE, "muon": DONE}, 0, "adamw")
    assert adamw.tried == {0.05: 4.6, 0.1: 4.0, 0.2: None}
    assert (adamw.lr, adamw.loss, adamw.over_reference, adamw.steps_to) == (0.1, 4.0, 0.0, 4.0)
    assert adamw.seconds_to == 5.0
    # 4.5 at step 2, 3.5 at step 4: at 4.0 after 3 steps, which took 2 + 1 + 1 seconds
    assert (muon.lr, muon.loss, muon.over_reference, muon.steps_to, muon.seconds_to) == (0.02, 3.5, -0.5, 3.0, 4.0)
    assert (muon.optimizer_ms, muon.step_ms, muon.state_bytes) == (25.0, 100.0, 500)
    assert muon.spread is None


def test_several_seeds_are_averaged_each_against_its_own_reference():
    def runs(label, losses):
        return {
            Spot(0, 0, seed): make_outcome(label=label, seed=seed, validations=[(0, 7.0), (2, 5.0), (4, loss)])
            for seed, loss in enumerate(losses)
        }

    outcomes = {"adamw": runs("adamw", [4.0, 4.4]), "dion": runs("dion", [3.0, 4.2])}
    _, dion = rows(outcomes, {"adamw": DONE, "dion": DONE}, 0, "adamw")
    assert dion.loss == pytest.approx(3.6)
    assert dion.spread == pytest.approx(0.6)
    assert dion.seeds == 2
    assert dion.over_reference == pytest.approx((-1.0 - 0.2) / 2)
    # from 5 at step 2 to 3 at step 4: 4.0 at 3; to 4.2: 4.4 at 2 + 2 * 0.6 / 0.8 = 3.5
    assert dion.steps_to == pytest.approx((3 + 3.5) / 2)


def test_a_seed_that_never_gets_there_means_never():
    outcomes = {
        "adamw": {Spot(0, 0, seed): make_outcome(seed=seed) for seed in (0, 1)},
        "dion": {
            Spot(0, 0, 0): make_outcome(label="dion", validations=[(0, 7.0), (4, 3.0)]),
            Spot(0, 0, 1): make_outcome(label="dion", seed=1, validations=[(0, 7.0), (4, 4.1)]),
        },
    }
    _, dion = rows(outcomes, {"adamw": DONE, "dion": DONE}, 0, "adamw")
    assert dion.steps_to is None
    assert "never" in markdown([dion], "adamw", "")


def test_a_diverged_seed_is_told_and_left_out_of_the_mean():
    outcomes = {
        "dion": {
            Spot(0, 0, 0): make_outcome(label="dion"),
            Spot(0, 0, 1): make_outcome(label="dion", seed=1, status="diverged"),
        }
    }
    (dion,) = rows(outcomes, {"dion": DONE}, 0, None)
    assert (dion.loss, dion.seeds, dion.diverged_seeds) == (4.0, 1, 1)
    assert "1 diverged" in markdown([dion], None, "")


def test_a_rival_whose_every_run_diverged_is_a_row():
    outcomes = {
        "adamw": {Spot(0, 0, 0): make_outcome()},
        "dion": {Spot(k, 0, 0): make_outcome(label="dion", lr=0.1 * 2**k, k=k, status="diverged") for k in (-1, 0, 1)},
    }
    adamw, dion = rows(outcomes, {"adamw": DONE, "dion": State([], None, True)}, 0, "adamw")
    assert dion.status == "diverged"
    assert dion.tried == {0.05: None, 0.1: None, 0.2: None}
    assert dion.loss is None
    line = markdown([adamw, dion], "adamw", "").splitlines()[-3]
    assert line.split("|")[1:5] == [" dion ", "  ", "  ", " diverged "]


def test_a_reference_that_diverged_leaves_its_columns_empty():
    outcomes = {
        "adamw": {Spot(0, 0, 0): make_outcome(status="diverged")},
        "dion": {Spot(0, 0, 0): make_outcome(label="dion")},
    }
    made = rows(outcomes, {"adamw": State([], None, False), "dion": DONE}, 0, "adamw")
    assert made[1].over_reference is None
    assert "never" not in markdown(made, "adamw", "")


def test_unfinished_rivals_are_shown_as_running():
    outcomes = {"adamw": {Spot(0, 0, 0): make_outcome()}, "dion": {}}
    states = {"adamw": State([Spot(0, 0, 1)], (0, 0)), "dion": State([Spot(0, 0, 0)], None)}
    made = rows(outcomes, states, 0, "adamw")
    assert [row.status for row in made] == ["running", "running"]
    assert made[0].loss == 4.0


def test_markdown_is_a_table():
    outcomes = {"adamw": {Spot(0, 0, 0): make_outcome()}, "a|b": {Spot(0, 0, 0): make_outcome(label="a|b", lr=0.02)}}
    made = rows(outcomes, {"adamw": DONE, "a|b": State([], (0, 0), True)}, 0, "adamw")
    lines = markdown(made, "adamw", "what was run").splitlines()
    assert lines[0].startswith("| optimizer | best lr | scalar lr | validation loss | minus adamw |")
    assert lines[2] == "| adamw | 0.1 | 0.012 | 4.000 | +0.000 | 4 | 5 | 10.0 | 100 | 1.0 kB | 1 |"
    assert lines[3].startswith("| a\\|b | 0.02 (edge) |")
    columns = {line.replace("\\|", "").count("|") for line in lines[:4]}
    assert len(columns) == 1
    assert lines[-1] == "what was run"


def test_the_screen_marks_the_best_and_a_narrow_one_has_fewer_columns():
    outcomes = {
        "adamw": {Spot(0, 0, 0): make_outcome(status="diverged")},
        "dion": {Spot(0, 0, 0): make_outcome(label="dion")},
    }
    made = rows(outcomes, {"adamw": State([], None), "dion": DONE}, 0, None)
    wide, narrow = screen(made, None), screen(made, None, width=80)
    assert [row.style for row in wide.rows] == ["red", "bold"]
    assert [len(table.columns) for table in (wide, narrow)] == [11, 9]
