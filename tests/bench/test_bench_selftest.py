"""``bench --self-test`` on the CPU, whose sections pass, and faults that each section finds."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager

import pytest
import torch

from orthoshard.directions import low_rank
from orthoshard.lab.bench import cli
from orthoshard.lab.bench.selftest import cases, graphs, memory, orthonormal, rounding, run, syncs
from orthoshard.lab.bench.selftest.correct import correct
from orthoshard.lab.bench.selftest.rows import Check, absent, run_check

CPU = torch.device("cpu")


def result(checks, what):
    """The row of the check of this name, with the default kernels where several have it."""
    return run_check("section", next(check for check in checks if f"{check.what}, ".startswith(f"{what}, ")))


def test_a_table_as_it_goes_and_a_file(tmp_path, capsys):
    out = tmp_path / "self-test.json"
    assert cli.main(["--self-test", "--only", "orth*", "graphs", "--device", "cpu", "--out", str(out)]) == 0
    shown, file = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert len(shown) == 3 + len(file["rows"])
    assert {row["section"] for row in file["rows"]} == {"orthonormal", "graphs"}
    assert file["failed"] == 0
    assert file["ok"] == len(file["rows"]) - 1
    (skipped,) = [row for row in file["rows"] if row["result"] == "skipped"]
    assert skipped["reason"] == "needs CUDA, and this is cpu"
    assert all(row["figure"] <= row["limit"] for row in file["rows"] if row["result"] == "ok")
    assert {"torch", "cuda", "triton", "capability", "device", "cpu", "commit", "command"} <= set(file)


def test_a_failure_is_a_row_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def raises():
        raise RuntimeError("first line\nsecond line")

    def ends(device):
        yield Check("fine", lambda: (1.0, 1.0))
        yield Check("raises", raises)
        yield Check("no number", lambda: (float("nan"), 1.0))
        yield absent("elsewhere", "it is not there")
        raise OSError("the section")

    monkeypatch.setattr(run, "SECTIONS", {"one": ends, "other": lambda device: [Check("also", lambda: (2.0, 1.0))]})
    out = tmp_path / "self-test.json"
    assert cli.main(["--self-test", "--device", "cpu", "--out", str(out)]) == 1
    found = [(row["what"], row["result"], row["reason"]) for row in json.loads(out.read_text())["rows"]]
    assert found == [
        ("fine", "ok", ""),
        ("raises", "FAIL", "RuntimeError: first line"),
        ("no number", "FAIL", ""),
        ("elsewhere", "skipped", "it is not there"),
        ("the section itself", "FAIL", "OSError: the section"),
        ("also", "FAIL", ""),
    ]
    assert "1 ok, 4 failed, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "corect"], "--self-test has no such section; it has correct"),
        (["--stages"], "--stages and --self-test do not go together"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_what_cannot_be_is_refused_before_the_start(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_section", lambda *_: pytest.fail("it started"))
    assert cli.main(["--self-test", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dion", "muon", "adamw", "dion_tail, cautious"])
def test_a_rule_passes(name):
    assert result(correct(CPU), f"{name}, float32").result == "ok"


def test_products_that_round_more_than_they_should_fail(monkeypatch):
    """Of float32 matrices alone: the run in float64 is right."""
    exactly = low_rank.cholesky_qr_work

    def rounded(y, floor):
        return exactly(y.bfloat16().to(y.dtype) if y.dtype == torch.float32 else y, floor)

    monkeypatch.setattr(low_rank, "cholesky_qr_work", rounded)
    found = result(correct(CPU), "dion, float32")
    assert found.result == "FAIL"
    assert found.figure > 10 * found.limit
    assert result(correct(CPU), "muon, float32").result == "ok"


def test_a_step_that_should_be_skipped_and_is_not_fails(monkeypatch):
    monkeypatch.setattr(cases, "BAD", -1)
    assert "0 steps were skipped" in result(correct(CPU), "adamw, float32").reason


def test_rounding_to_nearest_loses_small_steps(monkeypatch):
    what = "adamw: share of small steps lost"
    assert result(rounding.rounding(CPU), what).result == "ok"
    trained = rounding.trained
    monkeypatch.setattr(rounding, "trained", lambda options, *rest: trained({**options, "rounding": "nearest"}, *rest))
    found = result(rounding.rounding(CPU), what)
    assert found.result == "FAIL"
    assert found.figure > 0.5


def test_columns_that_are_not_orthonormal_fail(monkeypatch):
    exactly = orthonormal.cholesky_qr
    monkeypatch.setattr(orthonormal, "cholesky_qr", lambda y: exactly(y) * (1 + 1e-5))
    assert result(orthonormal.orthonormal(CPU), "rank 6, float32").result == "FAIL"
    monkeypatch.setattr(orthonormal, "cholesky_qr", lambda y: torch.linalg.qr(y).Q)
    assert "6 independent" in result(orthonormal.orthonormal(CPU), "rank 6, float32").reason


def test_settings_of_the_process_are_put_back():
    before = torch.get_float32_matmul_precision()
    assert result(orthonormal.tf32(CPU), '"medium": DionTail beyond rank 8').result == "ok"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_each_wait_of_a_step_counts(monkeypatch):
    """As torch says it on CUDA, with its own first warning, which is none of ours."""
    for name, call in {"synchronize": lambda *_: None, "get_sync_debug_mode": lambda: 0}.items():
        monkeypatch.setattr(torch.cuda, name, call)
    monkeypatch.setattr(
        torch.cuda,
        "set_sync_debug_mode",
        lambda *_: warnings.warn("Synchronization debug mode is a prototype", stacklevel=1),
    )
    assert result(syncs.syncs(CPU), "adamw, capturable").figure == 0
    step = cases.RuleOptimizer.step

    def waits(self, *rest):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        step(self, *rest)

    monkeypatch.setattr(cases.RuleOptimizer, "step", waits)
    assert result(syncs.syncs(CPU), "adamw, eager").result == "ok"
    assert "{'test_bench_selftest.py:" in result(syncs.syncs(CPU), "adamw, capturable").reason


@pytest.mark.parametrize("name", ["dion, float32", "muon, bfloat16", "lion, float32"])
def test_a_graph_that_keeps_its_first_rate_fails(name, monkeypatch):
    def stands_for_a_graph(follows):
        @contextmanager
        def graphed(optimizer):
            def replay():
                for group in optimizer.param_groups if not follows else ():
                    group["lr"].fill_(cases.LR)
                optimizer.step()

            optimizer.warmup_step()
            yield replay

        return graphed

    for follows, expected in ((True, "ok"), (False, "FAIL")):
        monkeypatch.setattr(graphs, "graphed", stands_for_a_graph(follows))
        assert result(graphs.graphs(CPU), name).result == expected


def test_a_step_that_takes_more_than_the_dry_run_says_fails(monkeypatch):
    monkeypatch.setattr(memory, "LAYER", ((64, 128),))
    monkeypatch.setattr(memory, "peak_bytes", lambda step, device: 1e7)
    assert result(memory.memory(CPU), "muon: MB").result == "FAIL"
    monkeypatch.setattr(memory, "BESIDE", 2e7)
    assert result(memory.memory(CPU), "muon: MB").result == "ok"


def test_numbers_that_json_lacks_are_words():
    row = run_check("section", Check("what", lambda: (float("inf"), 1.0)))
    assert json.dumps(row.as_json(), allow_nan=False)
