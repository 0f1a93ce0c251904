"""`orthoshard plan`: its table and JSON, its recommendation, and what it refuses."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orthoshard.lab.bench.environment import cores
from orthoshard.lab.plan import check, hardware
from orthoshard.lab.plan.cli import PlanConfig, main, number, plan
from orthoshard.lab.plan.estimate import times
from orthoshard.lab.plan.recommend import recommend

SMALL = (
    "--model",
    "tiny",
    "--mesh",
    "dp=2,fsdp=4,tp=2",
    "--hardware",
    "h100",
    "--tokens",
    "1B",
    "--tokens-per-step",
    "1M",
)


def shown(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_llama_405b_in_half_a_minute(tmp_path):
    """Of processor time, which the kernel holds: the machine may be busy."""

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    out = tmp_path / "plan.json"
    mesh = ["--model", "llama3-405b", "--mesh", "dp=16,fsdp=64,tp=8", "--hardware", "h100"]
    run_of = ["--tokens-per-step", "16M", "--tokens", "15T", "--price", "2", "--json", str(out)]
    command = [sys.executable, "-m", "orthoshard", "plan", *mesh, *run_of]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, preexec_fn=limit)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["model"]["parameters"] == 405_853_388_800
    assert found["links"] == {"dp": "inter", "fsdp": "inter", "tp": "intra"}
    model = 6 * 405_853_388_800 * 16e6 / (8192 * 989.4e12 * 0.4)
    for row in rows.values():
        spent = row["seconds"]
        assert spent["model"] == pytest.approx(model)
        assert row["overhead"] == pytest.approx((spent["optimizer"] + spent["sync"]) / spent["model"])
        assert row["days"] == pytest.approx(937_500 * spent["step"] / 86400)
        assert row["cost"] == pytest.approx(row["days"] * 24 * 8192 * 2)
    # two moments of float32, cut 512 ways; norms 64 ways
    assert rows["AdamW"]["state"] == pytest.approx(8 * 405_853_388_800 / 512, rel=1e-3)
    assert rows["Muon, shared by replicas"]["days"] < rows["Muon, repeated at replicas"]["days"]
    assert rows["DionTail 1/16, dealt"]["flops"] < rows["Muon, shared by replicas"]["flops"]
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().split("### Llama-3-405B on 8,192 H100")[1]
    told = [line.strip("| ").split(" | ") for line in page.split("\n### ")[0].splitlines() if line.startswith("| ")]
    assert len(told) == 11
    for name, *_, overhead, days in told[1:]:
        assert (overhead, days) == (f"{100 * rows[name]['overhead']:.3g} %", f"{rows[name]['days']:.4g}"), name


def test_every_row_is_there_and_the_recommended_one_is_a_row(capsys, tmp_path):
    out = tmp_path / "plan.json"
    text = shown(capsys, *SMALL, "--json", str(out))
    found = json.loads(out.read_text())
    names = [row["name"] for row in found["rows"]]
    assert all(name in text for name in names)
    assert found["recommended"] in names
    for part in ("Muon, state at owners", "Dion 1/4, factors averaged", "DionTail 1/64", "DionTail 1/16, dealt"):
        assert any(part in name for name in names), part
    assert "Assumptions" in text
    assert all(sentence[:40] in " ".join(text.split()) for sentence in found["advice"])
    assert not any("cost" in line for line in text.splitlines() if "overhead" in line), "no price, no cost"


def planned(**settings):
    base = {"model": "tiny", "mesh": "dp=2,fsdp=4,tp=2", "tokens": "1B", "tokens_per_step": "100k"}
    return plan(PlanConfig(**{**base, **settings}))


@pytest.mark.parametrize("rank", ["1", "1/16"])
def test_dealt_is_a_row_where_the_automatic_way_is_another(rank):
    """At full rank whole matrices are the smaller message, so that they are dealt by themselves."""
    names = [line.contestant.name for line in planned(ranks=(rank,), mesh="fsdp=4").lines]
    assert f"DionTail {rank}" in names
    assert (f"DionTail {rank}, dealt" in names) == (rank == "1/16")


def test_dion_tail_is_recommended_as_experimental():
    found = planned()
    tails = replace(found, lines=tuple(one for one in found.lines if one.contestant.row.rule in ("adamw", "dion_tail")))
    assert re.match(r"Take DionTail .*\(experimental\): of those", recommend(tails, 1e9).words[0])


def test_what_would_change_its_mind_changes_it():
    """Each figure that is solved for, put back."""
    found = planned()
    budget = 0.5 * found.lines[0].times.overhead + 0.5 * max(line.times.overhead for line in found.lines)
    words = " ".join(recommend(found, budget).words)
    chosen = recommend(found, budget).chosen
    tokens = float(re.search(r"fewer than ([\d.e+-]+) M tokens", words)[1]) * 1e6
    again = times(chosen.amounts, found.mesh, found.hardware.machine, replace(found.job, tokens_per_step=tokens))
    assert again.overhead == pytest.approx(budget, rel=0.01)


def test_factors_are_overtaken_where_it_says():
    found = planned(hardware="h100", per_node=2)
    text = " ".join(recommend(found, 0.05).words)
    rows = {line.contestant.name: line for line in found.lines}
    match = re.search(
        r"(Dion \S+, factors averaged) would overtake (Dion .+?) with links between nodes below (\S+) GB", text
    )
    if match is None:  # then factors are ahead already, and it says so
        assert re.search(r"factors averaged: .* ms a step less than", text)
        return
    machine = replace(found.hardware.machine, inter=float(match[3]) * 1e9)
    a, b = (times(rows[match[i]].amounts, found.mesh, machine, found.job).step for i in (1, 2))
    assert a == pytest.approx(b, rel=0.01)


def test_a_larger_budget_never_takes_a_later_one():
    found = planned()
    overheads = [recommend(found, budget).chosen.times.overhead for budget in (1e9, 1e-9)]
    assert recommend(found, 1e9).chosen.contestant.row.rule == "muon"
    assert overheads[1] == min(line.times.overhead for line in found.lines if line.fits)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "lama3-8b"), "did you mean 'llama3-8b'"),
        (("--mesh", "fdsp=2"), "did you mean 'fsdp'"),
        (("--mesh", "fsdp=12"), "do not fill nodes of 8"),
        (("--mesh", "fsdp=2,tp=16", "--per-node", "32"), "tp=16 does not divide the 4 attention heads"),
        (("--hardware", "h10"), "did you mean 'h100'"),
        (("--hardware", "nowhere.toml"), "cannot be read"),
        (("--price", "-1"), "--price is -1.0"),
        (("--price", "nan"), "--price is nan"),
        (("--utilization", "0"), "--utilization is 0.0"),
        (("--utilization", "1.5"), "--utilization is 1.5"),
        (("--tokens", "-3T"), "--tokens is '-3T'"),
        (("--tokens", "many"), "--tokens is 'many'"),
        (("--tokens", "1k"), "is more than all --tokens"),
        (("--tokens-per-step", "2", "--mesh", "fsdp=8"), "data ranks no token"),
        (("--budget", "0"), "--budget is 0.0"),
        (("--ranks", "2"), "rank fraction lies in"),
        (("--per-node", "0"), "--per-node is 0"),
        (("--threads", "0"), "--threads is 0"),
        (("--hardware", "measure", "--mesh", f"fsdp={cores() + 1}"), f"take a mesh of at most {cores()} ranks"),
        (("--model", "llama3-70b", "--mesh", "fsdp=8"), "does not fit: .* GB .* times as many ranks"),
        (("--model", "mixtral-8x7b", "--mesh", "ep=16"), "ep=16 does not divide the 8 experts"),
        (("--check", "--layers", "0"), "--layers is 0"),
    ],
)
def test_refusals(arguments, sentence, capsys):
    first = () if "--model" in arguments else ("--model", "tiny")
    assert main((*first, *arguments)) == 2
    captured = capsys.readouterr()
    assert re.search(sentence, captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("memory = -1", "memory is -1; give a number above 0"),
        ('memory = "fast"', "memory is 'fast'"),
        ('polar = "fp4"', "polar is 'fp4'; choose one of"),
        ("achieved = { products = 2, memory = 1, links = 1 }", "achieved products is 2.0"),
        ("achieved = { products = 1 }", "memory is None"),
        ("per_node = 0", "per_node is 0"),
    ],
)
def test_a_machine_of_ones_own_is_read_and_checked(change, sentence, tmp_path):
    table = {key: value for key, value in hardware.catalogue()["h100"].items() if key != "achieved"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    lines.append("achieved = { products = 0.5, memory = 1, links = 1 }")
    path = tmp_path / "mine.toml"
    path.write_text("[mine]\n" + "\n".join(lines))
    found = hardware.find(str(path))
    assert found.machine.polar == 0.5 * 989.4e12
    assert hardware.find(f"{path}:mine") == found
    key = change.partition(" ")[0]
    path.write_text("[mine]\n" + "\n".join([*(line for line in lines if not line.startswith(f"{key} ")), change]))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        hardware.find(str(path))
    path.write_text("[mine")
    with pytest.raises(ValueError, match="is not TOML"):
        hardware.find(str(path))


def test_every_machine_of_the_catalogue_has_a_source():
    for name in hardware.catalogue():
        found = hardware.find(name)
        assert found.source
        assert found.machine.intra >= found.machine.inter


def test_numbers():
    assert [number("", text) for text in ("16M", "15T", "1.5k", "300")] == [16e6, 15e12, 1500, 300]


def test_the_list(capsys):
    assert "b200" in shown(capsys, "--list")


def test_a_check_measures_and_predicts_the_same_matrices(monkeypatch, capsys, tmp_path):
    """One process, a tiny model: times are of no interest here, only that both come from the same plan."""
    monkeypatch.setattr("orthoshard.lab.plan.cli.PROCESSES", (1,))
    monkeypatch.setattr(check, "RIVALS", check.RIVALS[:3])
    monkeypatch.setattr("orthoshard.lab.plan.measure.WIDTH", 128)
    monkeypatch.setattr("orthoshard.lab.plan.measure.ENTRIES", 2**16)
    out = tmp_path / "check.json"
    text = shown(capsys, "--check", "--check-model", "tiny", "--layers", "1", "--rounds", "1", "--json", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["adamw", "muon", "dion-1/4"]
    for row in rows:
        assert row["predicted_ms"] == pytest.approx(sum(row["parts_ms"].values()))
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"])
        assert row["within"] == (abs(row["ratio"] - 1) <= 0.3)
    assert f"{sum(row['within'] for row in rows)} of 3 within 30%" in text
