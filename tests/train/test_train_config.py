"""Settings: what may be said, what is refused with which sentence, and how quickly help comes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from orthoshard import Dion, DionTail, Muon, RuleOptimizer
from orthoshard.lab.train import cli
from orthoshard.lab.train.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig, from_dict, to_dict
from orthoshard.lab.train.errors import UserError
from orthoshard.lab.train.model import build_model
from orthoshard.lab.train.optimizers import build_optimizer
from orthoshard.lab.train.presets import load_preset, preset_names
from orthoshard.lab.train.schedule import factor


def test_config_survives_json() -> None:
    config = replace(TrainConfig(), optimizer=OptimizerConfig("muon", lr=0.1 + 0.2, nesterov=True), seed=7)
    assert from_dict(TrainConfig(), json.loads(json.dumps(to_dict(config))), "a test") == config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_checks(name: str) -> None:
    load_preset(name).check()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": {"rank_fracton": 0.5}}, "did you mean 'rank_fraction'"),
        ({"optimiser": {}}, "did you mean 'optimizer'"),
        ({"schedule": 3}, "is a table"),
        ({"schedule": {"steps": "many"}}, "of type int"),
        ({"schedule": {"steps": True}}, "of type int"),
        ({"optimizer": {"rank_fraction": "1/0"}}, "of type float"),
        ({"optimizer": {"rank_fraction": "a/4"}}, "of type float"),
        ({"schedule": {"decay": "stairs"}}, "cosine, linear, none"),
        ({"record": {"tensorboard": 1}}, "of type bool"),
    ],
)
def test_wrong_preset_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        from_dict(TrainConfig(), values, "a test")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lr", "nan"], "--lr is nan; give a finite number"),
        (["--lr", "inf"], "--lr is inf; give a finite number"),
        (["--scalar-lr", "nan"], "--scalar-lr is nan"),
        (["--steps", "0"], "--steps is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--clip", "nan"], "--clip is nan"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--vocabulary", "100"], "at least 257"),
        (["--preset", "defualt"], "did you mean 'default'"),
        (["--preset", "mine.toml"], "there is no preset at mine.toml"),
        (["--optimizer", "dino"], "did you mean 'dion'"),
        (["--optimizer", "adamw", "--rank-fraction", "0.5"], "--rank-fraction means nothing to the optimizer adamw"),
        (["--optimizer", "muon", "--scalar", "lyon"], "did you mean 'lion'"),
        (["--rank-fraction", "1.5"], "rank_fraction"),
        (["--rank-fraction", "0"], "rank_fraction"),
        (["--rank-fraction", "5/4"], "rank_fraction"),
        (["--optimizer", "adamw", "--scalar", "lion"], "--scalar means nothing to the optimizer adamw"),
        (["--model", "tinny"], "did you mean 'tiny'"),
        (["--corpus", "shakespear"], "did you mean 'shakespeare'"),
        (["--device", "warp"], "the device 'warp' cannot be used"),
        (["--resume"], "there is no run in nowhere"),
        (["--resume", "--preset", "quick"], "leave --preset out"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str],
    sentence: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [] if "--preset" in flags or "--resume" in flags else ["--preset", "quick"]
    data = [] if "--corpus" in flags else ["--corpus", f"text:{text}", "--cache", str(text.parent / "cache")]
    assert cli.main([*quick, *data, "--out", "nowhere", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said
    assert not Path("nowhere").exists()


def test_another_optimizer_drops_the_presets_rank_and_lr() -> None:
    config = cli.parse(["--optimizer", "adamw"]).config
    assert config.optimizer == OptimizerConfig("adamw")
    assert cli.parse(["--optimizer=muon", "--lr", "0.5"]).config.optimizer == OptimizerConfig("muon", lr=0.5)


def test_flags_go_on_top_of_the_users_own_preset(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[optimizer]\nname = "muon"\nlr = 1\n[schedule]\nsteps = 7\n')
    config = cli.parse(["--preset", str(mine), "--steps", "9"]).config
    assert (config.optimizer.name, config.optimizer.lr, config.schedule.steps) == ("muon", 1.0, 9)


def test_ranks_may_be_fractions() -> None:
    assert cli.parse(["--rank-fraction", "1/16"]).config.optimizer.rank_fraction == 1 / 16
    assert cli.parse(["--rank-fraction=0.3"]).config.optimizer.rank_fraction == 0.3
    assert from_dict(OptimizerConfig(), {"rank_fraction": "3/8"}, "a test").rank_fraction == 3 / 8
    with pytest.raises(SystemExit):
        cli.parse(["--rank-fraction", "1/0"])


@pytest.mark.parametrize("name", ["dion", "dion_tail", "muon", "adamw"])
def test_matrices_and_all_else_have_a_rate_each(name: str) -> None:
    model = build_model(ModelConfig("nano"), 300, 0)
    groups = build_optimizer(model, OptimizerConfig(name, lr=0.01, scalar_lr=0.005)).param_groups
    rates = {group["role"]: group["lr"] for group in groups}
    assert rates == {"matrix": 0.01, "embedding": 0.005, "norm": 0.005, "head": 0.005}


@pytest.mark.parametrize("rule", [Dion, DionTail, Muon])
def test_the_library_and_the_command_have_the_same_default_rate(rule: type[RuleOptimizer]) -> None:
    model = build_model(ModelConfig("nano"), 300, 0)
    mine, theirs = rule(model), build_optimizer(model, OptimizerConfig(rule.default_rule))
    assert mine.defaults["lr"] == theirs.defaults["lr"]
    assert [group["lr"] for group in mine.param_groups] == [group["lr"] for group in theirs.param_groups]


def test_help_imports_no_transformers() -> None:
    code = (
        "import sys\nfrom orthoshard.lab.train import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as left: print(left.code)\n"
        "assert not {'transformers', 'tokenizers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("0")
    assert "--rank-fraction" in done.stdout


def test_misspelt_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--stepz", "3"])
    assert left.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["linear", "cosine", "none"])
def test_schedule(decay: str) -> None:
    config = ScheduleConfig(steps=100, warmup=10, decay=decay, decay_steps=40, final_factor=0.1)
    factors = [factor(config, step) for step in range(100)]
    assert factors[:10] == [(s + 1) / 11 for s in range(10)]
    assert factors[10:61] == [1.0] * 51
    if decay == "none":
        assert set(factors[10:]) == {1.0}
        return
    assert all(a > b for a, b in pairwise(factors[60:]))
    half = factors[80]  # 20 of 40 steps into the decay
    assert half == pytest.approx(0.1 + 0.9 * (0.5 if decay == "linear" else (1 + math.cos(math.pi / 2)) / 2))
    assert factor(config, 100) == pytest.approx(0.1)
