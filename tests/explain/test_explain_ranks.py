"""From a run with spectra to the rank fractions its matrices need: a real run, spectra known by hand, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orthoshard.__main__ import main
from orthoshard.diagnostics import FRACTIONS
from orthoshard.lab.explain.need import advise
from orthoshard.lab.train import cli, record
from orthoshard.lab.train.errors import UserError

TINY = ["--model", "nano", "--vocabulary", "300", "--context", "16", "--batch", "2", "--steps", "6", "--threads", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text.txt"
    path.write_text("".join(f"Line {k} of {k * k}: to be, or not to be.\n" for k in range(2000)))
    return ["--corpus", f"text:{path}", "--cache", str(folder / "cache"), "--sample-tokens", "0"]


def losses(folder: Path):
    return [event["loss"] for event in record.read(folder) if event["kind"] in ("step", "validation")]


def test_a_run_records_figures_and_trains_on_as_without(text, tmp_path: Path, capsys):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert cli.main([*TINY, *text, "--out", str(plain)]) == 0
    assert cli.main([*TINY, *text, "--out", str(watched), "--diagnostics", "2", "--spectra", "--tensorboard"]) == 0
    assert losses(plain) == losses(watched)
    shown = [event for event in record.read(watched) if event["kind"] == "diagnostics"]
    assert [event["step"] for event in shown] == [2, 4, 6]
    assert shown[0]["groups"] == [{"rule": "dion", "role": "matrix", "view": "whole", "rank_fraction": 0.25}]
    assert len(shown[0]["parameters"]) == 14
    one = shown[-1]["parameters"]["model.layers.0.mlp.up_proj.weight"]
    assert 0.3 < one["captured"] <= one["spectrum"][FRACTIONS.index(0.25)] + 1e-6
    assert one["rank"] == 16
    assert list((watched / "tensorboard").iterdir())
    capsys.readouterr()
    assert main(["explain", str(watched)]) == 0
    table = capsys.readouterr().out
    assert "dion, matrix" in table
    assert "model.layers.*.self_attn.q_proj.weight" in table
    assert main(["explain", str(watched), "--json", "--targets", "50", "99.5", "--from-step", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [4, 6]
    assert found["groups"][0]["needs"].keys() == {"0.5", "0.995"}


def test_a_resumed_run_cuts_figures_that_no_checkpoint_knows(text, tmp_path: Path):
    out = ["--out", str(tmp_path / "run")]
    assert cli.main([*TINY, *text, *out, "--diagnostics", "1", "--checkpoint-every", "2", "--keep", "5"]) == 0
    assert cli.main(["--resume-from", "2", *out]) == 0
    steps = [event["step"] for event in record.read(tmp_path / "run") if event["kind"] == "diagnostics"]
    assert steps == [1, 2, 3, 4, 5, 6]


def written(folder: Path, spectra: dict[str, list[float]], step: int = 10, **more) -> Path:
    """A record with these spectra: the shares at each fraction."""
    parameters = {
        name: {
            "group": 0, "matrices": 1, "rank": 16, "live": 16, "captured": 0.8, "effective_rank": 2.0,
            "tail_flatness": 0.3, "orthogonality": 0.0, "basis": 0.0, "update_rms": 0.1, "spectrum": spectrum, **more,
        }
        for name, spectrum in spectra.items()
    }  # fmt: skip
    groups = [{"rule": "dion", "role": "matrix", "view": "whole", "rank_fraction": 0.25}]
    folder.mkdir(exist_ok=True)
    with (folder / record.NAME).open("a") as file:
        event = {"kind": "diagnostics", "step": step, "groups": groups, "parameters": parameters}
        file.write(json.dumps(event) + "\n")
    return folder


def ramp(full: float) -> list[float]:
    """Energy that grows in proportion to the rank, until all is there at ``full``."""
    return [min(1.0, fraction / full) for fraction in FRACTIONS]


def test_needs_are_those_of_the_mean_spectrum(tmp_path: Path):
    """Half the matrices need all their rank for their energy, half a quarter of it: C(f) = 1/2 + f/2 above 1/4."""
    written(tmp_path, {"layers.0.a": ramp(1.0), "layers.1.a": ramp(1.0), "layers.0.b": ramp(1 / 4), "c.1": ramp(1 / 4)})
    needs, steps = advise(tmp_path, (0.75, 0.9), None)
    assert steps == [10]
    group = needs[0]
    assert group.matrices == 4
    assert group.needs == {0.75: 0.5, 0.9: 52 / 64}  # 0.8, rounded up
    assert group.weakest[0.75] == ("layers.0.a", 0.5)
    assert group.possible == pytest.approx(0.5 + 0.125)
    assert group.captured == pytest.approx(0.8)
    assert group.flatness == pytest.approx(0.3)
    assert [(need.label, need.matrices) for need in needs[1:]] == [("layers.*.a", 2), ("layers.*.b", 1), ("c.*", 1)]
    assert needs[2].needs == {0.75: 12 / 64, 0.9: 15 / 64}


def test_the_later_half_counts_and_experts_weigh_as_many(tmp_path: Path):
    written(tmp_path, {"a": ramp(1.0)}, step=2)
    written(tmp_path, {"a": ramp(1 / 2), "b": ramp(1 / 2)}, step=6)
    written(tmp_path, {"a": ramp(1 / 2), "b": ramp(1 / 2)}, step=10)
    assert advise(tmp_path, (1.0,), None)[0][0].needs == {1.0: 0.5}
    assert advise(tmp_path, (1.0,), 1)[0][0].needs == {1.0: 1.0}
    assert advise(tmp_path, (1.0,), 1)[1] == [2, 6, 10]


def test_a_matrix_that_was_zero_takes_no_part(tmp_path: Path):
    written(tmp_path, {"a": ramp(1 / 2)})
    written(tmp_path, {"a": None, "b": None}, step=11, captured=None, effective_rank=None)
    written(tmp_path, {"a": None, "b": ramp(1.0)}, step=12)
    needs, steps = advise(tmp_path, (1.0,), 10)
    assert steps == [10, 12]
    assert [(need.label, need.needs[1.0]) for need in needs] == [("dion, matrix", 1.0), ("a", 0.5), ("b", 1.0)]


def test_bad_input_is_one_sentence(tmp_path: Path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["explain", *arguments]) == 2
        return capsys.readouterr().err

    assert "there is no run in" in refused(str(tmp_path / "nowhere"))
    whole = str(written(tmp_path / "whole", {"a": ramp(0.5)}))
    assert "--targets are 0" in refused(whole, "--targets", "0")
    assert "--targets are 90 101" in refused(whole, "--targets", "90", "101")
    assert "after the last recorded" in refused(whole, "--from-step", "11")
    assert "no spectra; train, or resume the run, with --diagnostics" in refused(
        str(written(tmp_path / "none", {"a": None}))
    )
    assert "another version" in refused(str(written(tmp_path / "odd", {"a": ramp(0.5)}, group=3)))
    (tmp_path / "whole" / record.NAME).write_text('{"kind": "diagnostics"\n{}\n')
    assert "line 1 of" in refused(whole)


def test_flags_that_cannot_be(capsys):
    assert cli.main(["--spectra"]) == 2
    assert "give both" in capsys.readouterr().err
    assert cli.main(["--diagnostics", "-1"]) == 2
    assert "--diagnostics is -1" in capsys.readouterr().err


def test_a_bare_flag_is_every_ten_steps():
    assert cli.parse(["--diagnostics", "--steps", "3"]).config.record.diagnostics == 10
    assert cli.parse(["--steps", "3", "--diagnostics"]).config.record.diagnostics == 10
    assert cli.parse(["--diagnostics", "7"]).config.record.diagnostics == 7
    assert cli.parse([]).config.record.diagnostics == 0


def test_a_record_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / record.NAME).write_text('{"kind": "diagnostics", "step": 3, "parameters": [1]}\n')
    with pytest.raises(UserError, match="edited"):
        advise(tmp_path, (0.9,), None)
