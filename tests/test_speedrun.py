"""The harness of the speed run: the model that the rules fix, and a run that goes on to the bit."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orthoshard.lab.train.tokens import write_tokens

HERE = Path(__file__).parents[1] / "experiments" / "speedrun"


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """What calls the command line with these flags."""
    monkeypatch.syspath_prepend(str(HERE))
    generator = np.random.default_rng(0)
    for name, count in (("x_train_1", 600), ("x_train_2", 2000), ("x_val_0", 1000)):
        write_tokens(tmp_path / f"{name}.bin", generator.integers(0, 40, count))

    def run(out, *flags):
        command = ["run.py", "--data", tmp_path, "--tiny", "--steps", "6", "--out", tmp_path / out, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        runpy.run_path(str(HERE / "run.py"), run_name="__main__")
        return tmp_path / out

    yield run
    sys.modules.pop("model", None)


def test_the_model_is_the_benchmark_s(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    with torch.device("meta"):
        model = runpy.run_path(str(HERE / "model.py"))["Transformer"]()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sizes["embed.weight"] == sizes["head.weight"] == 50_304 * 768
    blocks = 12 * (12 * 768**2 + (4 + 4 + 1) * 768 + 2 * 768)
    assert sum(sizes.values()) == 2 * 50_304 * 768 + 50_304 + blocks + 2 * 768


@pytest.mark.parametrize("entry", ["tail-1/4", "adamw"])
def test_a_run_goes_on_to_the_bit(harness, entry):
    whole = harness("whole", "--optimizer", entry)
    harness("parts", "--optimizer", entry, "--stop", "2")
    parts = harness("parts", "--optimizer", entry)
    lines = [[json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()] for out in (whole, parts)]
    assert [line["step"] for line in lines[0]] == [0, 2, 4, 6]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert lines[0][-1]["loss"] < lines[0][0]["loss"] - 0.5
    models = [torch.load(out / "last.pt", weights_only=True)["model"] for out in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    with pytest.raises(SystemExit, match="is of other settings"):
        harness("whole", "--optimizer", entry, "--set", "lr=0.5")


def test_rates_are_the_rules(harness, tmp_path):
    out = harness("rates", "--stop", "0", "--set", "lr=0.03")
    groups = torch.load(out / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    rates = {(group["rule"], group["role"]): float(group["lr"]) for group in groups}
    assert rates["dion_tail", "matrix"] == 0.03
    assert (rates["adamw", "embedding"], rates["adamw", "head"]) == (0.3, 1 / 320)
    assert {group["lr"] for group in groups if group["rule"] == "adamw"} == {0.3, 1 / 320, 0.01}
