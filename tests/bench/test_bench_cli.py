"""The verb from its flags to its file, on the tiny model, and every error a user can make."""

import json
from pathlib import Path
from time import sleep

import pytest
import torch

from orthoshard.__main__ import main
from orthoshard.lab.bench import checks, cli
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.contestants import (
    NARROW,
    TRITON,
    Workload,
    all_contestants,
    choose,
    memory_needed,
    parse_rank,
)
from orthoshard.lab.bench.models import find_model

NAMES = [
    "dion-1/4",
    "floor-dion-1/4",
    "dion-tail-1/4",
    "floor-dion-tail-1/4",
    "muon",
    "floor-muon",
    "adamw-fused",
    "torch-muon",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("bench") / "results" / "tiny.json"
    arguments = ["--model", "tiny", "--ranks", "1/4", "--rounds", "4", "--device", "cpu", "--out", str(out)]
    assert cli.main(arguments) == 0
    return json.loads(out.read_text())


def test_every_contestant_has_every_field(result):
    assert list(result["contestants"]) == NAMES
    for name, row in result["contestants"].items():
        assert row["rounds"] == 4 == len(row["times_ms"])
        assert row["min_ms"] == min(row["times_ms"]) <= row["median_ms"] <= row["max_ms"] == max(row["times_ms"])
        if name.startswith("floor"):
            assert row["flops"] > 0
            assert row["state_bytes"] is None
        else:
            assert len(row["first_times_ms"]) == 3
            assert row["first_over_median"] == row["first_ms"] / row["median_ms"]
            assert row["peak_over_weights"] == row["peak_bytes"] / (4 * 16384) >= 0
            assert row["state_bytes"] > 0


def test_ratios_are_those_of_the_times(result):
    rows = result["contestants"]
    for ratios, time in (("ratios_of_medians", "median_ms"), ("ratios_of_minima", "min_ms")):
        dion = rows["dion-1/4"]
        assert dion[ratios] == {
            "floor": dion[time] / rows["floor-dion-1/4"][time],
            "adamw-fused": dion[time] / rows["adamw-fused"][time],
            "torch-muon": dion[time] / rows["torch-muon"][time],
            "muon": dion[time] / rows["muon"][time],
        }
        assert rows["dion-tail-1/4"][ratios]["rival"] == rows["dion-tail-1/4"][time] / dion[time]
        assert rows["muon"][ratios]["floor"] == rows["muon"][time] / rows["floor-muon"][time]
        assert "floor" not in rows["adamw-fused"][ratios]


def test_state_is_what_each_algorithm_keeps(result):
    elements = 2 * (96 * 32 + 32 * 32 + 64 * 32 + 32 * 64)
    state = {name: row["state_bytes"] for name, row in result["contestants"].items()}
    assert state["torch-muon"] == 4 * elements
    assert state["muon"] == 4 * elements
    assert state["adamw-fused"] == 4 * (2 * elements + 8)
    rank = 8
    assert state["dion-1/4"] == 4 * (elements + 2 * rank * (96 + 32 + 64 + 32)), "momentum, and Q spanning the rows"
    assert state["dion-tail-1/4"] == state["dion-1/4"]


def test_the_file_says_where_it_was_measured(result):
    assert result["torch"] == str(torch.__version__)
    assert result["threads"] == torch.get_num_threads()
    assert result["model"]["matrix_elements"] == 16384
    assert {"matrices": 2, "d_out": 96, "d_in": 32} in result["model"]["batches"]
    for key in ("cpu", "date", "command", "commit", "gpu", "load_before", "load_after", "dtype", "device", "cores"):
        assert key in result


def test_all_contestants_share_the_gradients_and_none_the_weights():
    work = Workload(find_model("tiny"), torch.device("cpu"), torch.float32)
    first, second = work.parameters(), work.parameters()
    for a, b, gradient in zip(first, second, work.gradients, strict=True):
        assert a.grad is gradient
        assert b.grad is gradient
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("rank", ["1", "1/4"])
def test_no_step_changes_a_gradient(rank):
    work = Workload(find_model("tiny"), torch.device("cpu"), torch.float32)
    copies = [gradient.clone() for gradient in work.gradients]
    for contestant in all_contestants([rank]):
        if contestant.optimizer is not None:
            weights = work.parameters()
            before = [weight.detach().clone() for weight in weights]
            contestant.optimizer(weights).step()
            assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
        else:
            assert contestant.products is not None
            contestant.products(work).step()
        assert all(torch.equal(g, c) for g, c in zip(work.gradients, copies, strict=True)), contestant.name


def test_a_falling_spectrum_falls():
    flat = Workload(find_model("tiny"), torch.device("cpu"), torch.float32)
    falling = Workload(find_model("tiny"), torch.device("cpu"), torch.float32, "falling")
    ratio = [torch.linalg.svdvals(work.gradients[0])[[0, -1]] for work in (flat, falling)]
    assert ratio[0][0] / ratio[0][1] < 10
    assert ratio[1][0] / ratio[1][1] > 30
    assert falling.gradients[0].square().mean() < flat.gradients[0].square().mean()


def test_only_chooses_by_pattern():
    contestants = all_contestants(["1", "0.25", "1/4"])
    assert [c.name for c in contestants].count("dion-1/4") == 1, "0.25 is 1/4"
    assert [c.name for c in choose(contestants, ["*1/4", "muon"])] == NAMES[:5]
    usual = choose(contestants, [])
    assert [c.name for c in contestants if c not in usual] == ["normuon", "dion3", "row-norm"], "by name alone"


def test_narrow_state_is_a_contestant_by_name_or_by_flag(tmp_path: Path):
    plain, narrow = all_contestants(["1/4"]), all_contestants(["1/4"], NARROW["bfloat16"])
    added = [c.name for c in narrow if c not in plain and "bf16" in c.name]
    assert added == [
        *("dion-bf16-1/4", "floor-dion-bf16-1/4", "dion-bf16-products-1/4", "dion-bf16-both-1/4"),
        *("dion-tail-bf16-1/4", "floor-dion-tail-bf16-1/4", "dion-tail-bf16-products-1/4", "dion-tail-bf16-both-1/4"),
        *("muon-bf16", "floor-muon-bf16", "normuon-bf16", "dion3-bf16", "row-norm-bf16"),
    ]
    rows = {c.name: c for c in narrow}
    assert (rows["dion-bf16-1/4"].rival, rows["dion-bf16-1/4"].floor) == ("dion-1/4", "floor-dion-bf16-1/4")
    assert rows["dion-tail-bf16-1/4"].floor == "floor-dion-tail-bf16-1/4"
    assert (rows["muon-bf16"].rival, rows["muon-bf16"].floor) == ("muon", "floor-muon-bf16")
    out = tmp_path / "narrow.json"
    named = ["--model", "tiny", "--rounds", "1", "--first-steps", "0", "--skip-peak", "--out", str(out)]
    assert cli.main([*named, "--only", "dion-1/4", "dion-bf16-1/4", "floor-dion-bf16-1/4"]) == 0
    measured = json.loads(out.read_text())["contestants"]
    assert list(measured) == ["dion-1/4", "dion-bf16-1/4", "floor-dion-bf16-1/4"]
    assert measured["dion-bf16-1/4"]["state_bytes"] * 2 == measured["dion-1/4"]["state_bytes"]
    times = {name: row["median_ms"] for name, row in measured.items()}
    assert measured["dion-bf16-1/4"]["ratios_of_medians"] == {
        "floor": times["dion-bf16-1/4"] / times["floor-dion-bf16-1/4"],
        "rival": times["dion-bf16-1/4"] / times["dion-1/4"],
    }
    assert cli.main([*named, "--only", "muon*", "--state-dtype", "bfloat16"]) == 0
    assert list(json.loads(out.read_text())["contestants"]) == ["muon", "muon-bf16"]
    assert cli.main([*named, "--only", "muon*", "--state-dtype", "int8"]) == 0
    eight = json.loads(out.read_text())["contestants"]
    assert list(eight) == ["muon", "muon-int8"]
    assert eight["muon-int8"]["state_bytes"] * 3 < eight["muon"]["state_bytes"]


def test_triton_kernels_are_a_contestant_by_name_or_by_flag(capsys):
    rows = {c.name: c for c in all_contestants(["1/4"], [TRITON])}
    assert [name for name in rows if "triton" in name] == [
        *("dion-triton-1/4", "dion-tail-triton-1/4", "muon-triton", "normuon-triton", "dion3-triton"),
        "row-norm-triton",
    ]
    assert (rows["dion-triton-1/4"].rival, rows["dion-triton-1/4"].floor) == ("dion-1/4", "floor-dion-1/4")
    assert (rows["muon-triton"].rival, rows["muon-triton"].floor) == ("muon", "floor-muon")
    assert rows["floor-dion-1/4"].kernels == rows["dion-1/4"].kernels == "auto"
    assert cli.main(["--list", "--kernels", "triton"]) == 0
    assert "dion-triton-1/16" in capsys.readouterr().out


def test_memory_counts_weights_and_state():
    tiny = find_model("tiny")
    chosen = choose(all_contestants(["1/4"]), ["adamw-fused"])
    # gradients, weights, two moments, and one and a half for a step's temporaries, which are at least in float32
    assert memory_needed(chosen, tiny, torch.float32) == 5.5 * 4 * tiny.elements
    assert memory_needed(chosen, tiny, torch.bfloat16) == (4 * 2 + 1.5 * 4) * tiny.elements
    ours = choose(all_contestants(["1/4"]), ["muon"])
    assert memory_needed(ours, tiny, torch.bfloat16) == (2 * 2 + 4 + 1.5 * 4) * tiny.elements


def test_a_gpu_is_given_a_model_that_keeps_it_busy_and_that_fits(monkeypatch):
    assert cli.settled(BenchConfig()) == BenchConfig(model="gpt2-small", dtype="float32", ranks=("1", "1/4", "1/16"))
    monkeypatch.setattr(cli, "find_device", lambda _: torch.device("cuda"))
    assert cli.settled(BenchConfig(dtype="float32", ranks=("1/8",))).ranks == ("1/8",)
    usual = cli.settled(BenchConfig())
    assert (usual.model, usual.dtype) == ("llama-3.2-1b", "bfloat16")
    for beside in ([], [TRITON], NARROW["int8"]):  # bfloat16 has four forms, and its error says to name fewer
        chosen = choose(all_contestants(cli.settled(BenchConfig(), len(beside)).ranks, beside), ())
        assert memory_needed(chosen, find_model(usual.model), torch.bfloat16) < 80e9, beside
    assert cli.settled(BenchConfig(only=("dion-1",))).ranks == ("1", "1/4", "1/16")
    assert cli.settled(BenchConfig(owners=2)).dtype == "float32"


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1/4", 0.25), (" 0.0625 ", 0.0625)])
def test_parse_rank(text, value):
    assert parse_rank(text) == value


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gpt2-smal"], "did you mean 'gpt2-small'"),
        (["--ranks", "2"], "lies in (0, 1]"),
        (["--ranks", "0"], "lies in (0, 1]"),
        (["--ranks", "quarter"], "is a number such as"),
        (["--ranks", "1/0"], "is a number such as"),
        (["--only", "adamw-fusd"], "did you mean 'adamw-fused'"),
        (["--device", "gpu"], "no device 'gpu'"),
        (["--device", "meta"], "cpu and cuda"),
        (["--rounds", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--limit", "-1"], "or 0 for no limit"),
        (["--threads", "-1"], "at least 0"),
        (["--out", "."], "is a folder"),
        (["--device", "cpu", "--only", "dion-triton-1/4"], "Triton kernels, which need a CUDA device, and this is cpu"),
        (["--device", "cpu", "--kernels", "triton"], "Triton kernels, which need a CUDA device"),
        (["--stages", "--only", "dion-triton-1/4"], "--stages supports only torch's operations"),
        (["--processes", "2", "--kernels", "triton"], "--processes supports only torch's operations"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("the bench began"))
    assert cli.main(["--model", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_an_unwritable_folder_is_refused_before_timing(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("the bench began"))
    (tmp_path / "file").write_text("kept")
    assert cli.main(["--model", "tiny", "--out", str(tmp_path / "file" / "x.json")]) == 2
    assert "Nothing can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_too_little_memory_is_refused_before_it_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("the bench began"))
    monkeypatch.setattr(checks, "free_bytes", lambda device: 10**9)
    assert cli.main(["--model", "gpt2-xl", "--device", "cpu"]) == 2
    assert "name fewer with --only" in capsys.readouterr().err


def test_cuda_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--model", "tiny", "--device", "cuda"]) == 2
    assert "try --device cpu" in capsys.readouterr().err


def test_interrupted(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", interrupt)
    assert main(["bench", "--model", "tiny", "--out", str(tmp_path / "x.json")]) == 130
    assert list(tmp_path.iterdir()) == []


QUICK = ["--model", "tiny", "--device", "cpu", "--rounds", "1", "--skip-peak", "--only", "muon", "adamw-fused"]


def test_it_writes_into_runs_and_says_what_it_does(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(QUICK) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == [
        "runs/bench/tiny-cpu-float32.json"
    ]
    shown = capsys.readouterr()
    assert "runs/bench/tiny-cpu-float32.json" in shown.out
    assert "random gradients" in shown.err


def test_who_takes_longer_than_the_limit_is_left_out(monkeypatch, tmp_path, capsys):
    step = torch.optim.AdamW.step

    def slow(self, *rest):
        sleep(0.7)
        return step(self, *rest)

    out = tmp_path / "limited.json"
    assert cli.main([*QUICK, "--out", str(out)]) == 0  # warm
    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    assert cli.main([*QUICK, "--limit", "0.6", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["contestants"]) == ["muon"]
    assert result["left_out"]["adamw-fused"] >= 0.7
    assert "adamw-fused is left out: its first steps took" in capsys.readouterr().out
    assert cli.main([*QUICK[:-2], "adamw-fused", "--limit", "0.6", "--out", str(out)]) == 2
    assert "Every contestant took longer than --limit" in capsys.readouterr().err


def test_a_plot_that_cannot_be_drawn_is_refused_before_timing(monkeypatch, capsys):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(cli.replicas, "measure", lambda *_: pytest.fail("the bench began"))
    assert cli.main(["--model", "tiny", "--replicas", "2"]) == 2
    assert "needs matplotlib: pip install 'orthoshard[lab]'" in capsys.readouterr().err


def test_list(capsys):
    assert cli.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "gpt2-small" in shown
    assert "84.9 M" in shown
    assert "floor-dion-1/16" in shown
