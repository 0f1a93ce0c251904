"""The slow link: what is predicted, what a user gets wrong, and, where namespaces are allowed, a real one."""

import json
import os
import subprocess

import pytest

from orthoshard.lab.bench import cli, replicas, slow_link
from orthoshard.lab.bench.cli import BenchConfig, beside_gradients, replicas_setting, settled
from orthoshard.lab.bench.models import find_model
from orthoshard.lab.bench.tables import link_table


def test_prediction():
    # 100 MB at 100 Mbit/s are 8 s; 1 s of the step was no moving of data
    assert replicas.predict(1500, 500, 100e6, 100) == 1000 + 8000
    # at 10 Gbit/s they are 0.08 s, and this machine needs 0.5 s to move them
    assert replicas.predict(1500, 500, 100e6, 10_000) == 1500
    # a step that hid all of its moving is never faster than the wire
    assert replicas.predict(400, 500, 100e6, 1000) == 800


def test_factors_stand_beside_gradients_of_their_rank_and_the_slowest_link_comes_first():
    def row(*measured):
        points = [
            {"mbit": mbit, "predicted_ms": 1000, "measured_ms": ms, "ratio": 1000 / ms, "bound_by": "link"}
            for mbit, ms in zip((100, 300), measured, strict=True)
        ]
        return {"bytes": 5e6, "points": points}

    rows = beside_gradients({"gradients 1/16": row(8000, 3000), "factors 1/16": row(2000, 1500)})
    assert [rows[name]["against"] for name in rows] == [None, "gradients 1/16"]
    drawn = link_table({"model": "tiny", "replicas": 2, "contestants": rows})
    mbit, gain = (list(drawn.columns[k].cells) for k in (1, 6))
    assert mbit == ["100", "100", "300", "300"]
    assert gain == ["", "4.0", "", "2.0"]


def test_a_bucket_holds_two_milliseconds_and_no_less_than_a_frame():
    assert "rate 1000000000bit burst 250000 " in slow_link.bucket("eth0", 1000)
    assert "rate 2500000bit burst 16384 " in slow_link.bucket("eth0", 2.5)
    assert slow_link.bucket("eth0", None).endswith("noqueue")


def test_the_setting():
    config = settled(BenchConfig(replicas=4, bandwidths=(300, 100, 300), seconds=60))
    setting = replicas_setting(config, find_model("tiny"))
    assert [name for name, _ in setting.rivals] == ["gradients 1/16", "factors 1/16"]
    assert setting.rivals[1][1] == {"rule": "dion", "rank_fraction": 1 / 16, "replica_sync": "factors"}
    assert setting.bandwidths == (100, 300)
    assert setting.seconds == 30
    assert replicas.memory_needed(setting) == 8 * 4 * 4 * 16384


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--replicas", "1"], "give 2 to"),
        (["--replicas", "500"], "give 2 to"),
        (["--bandwidths", "0"], "from 0.1 to"),
        (["--bandwidths", "nan"], "from 0.1 to"),
        (["--rounds", "0"], "at least 1"),
        (["--ranks", "2"], "lies in (0, 1]"),
        (["--only", "muon"], "--only does not go with --replicas"),
        (["--processes", "2"], "--replicas and --processes do not go together"),
        (["--layers", "3"], "give 1 to 2"),
        (["--out", "."], "is a folder"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(cli, "check", lambda: None)
    monkeypatch.setattr(replicas, "measure", lambda *_: pytest.fail("the bench began"))
    given = arguments if "--replicas" in arguments else ["--replicas", "2", *arguments]
    assert cli.main(["--model", "tiny", *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda m: m.setattr("shutil.which", lambda tool: None if tool == "tc" else tool),
            "There is no tc on the PATH",
        ),
        (lambda m: m.setattr("os.geteuid", lambda: 1000), "Only root"),
        (lambda m: m.setattr("sys.platform", "darwin"), "run this on Linux"),
    ],
)
def test_a_machine_without_namespaces_is_told_what_to_do(change, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(replicas, "measure", lambda *_: pytest.fail("the bench began"))
    change(monkeypatch)
    assert cli.main(["--model", "tiny", "--replicas", "2", "--out", str(tmp_path / "x.json")]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def allowed():
    try:
        with slow_link.slow_link(2):
            pass
    except slow_link.NotAllowedError as error:
        pytest.skip(str(error))  # a container may withhold the right to make network namespaces


def alive(link):
    return [holder for holder in (*link.replicas, link.hub) if os.path.exists(f"/proc/{holder}")]


def test_nothing_stays_of_it_even_after_an_error(allowed):
    with slow_link.slow_link(2) as link:
        assert len(alive(link)) == 3
        link.limit(50)
        shown = subprocess.run(
            ["nsenter", f"--net=/proc/{link.hub}/ns/net", "tc", "qdisc"], capture_output=True, text=True
        ).stdout
        assert shown.count("rate 50Mbit") == 2
    assert not alive(link)
    with pytest.raises(RuntimeError, match="broken"), slow_link.slow_link(2) as link:
        raise RuntimeError("broken")
    assert not alive(link)


@pytest.mark.slow
def test_two_replicas_over_a_real_slow_link(allowed, tmp_path):
    out = tmp_path / "slow.json"
    arguments = ["--model", "tiny", "--replicas", "2", "--bandwidths", "1", "--rounds", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    result = json.loads(out.read_text())
    full, thin = (result["contestants"][f"{sync} 1/16"] for sync in ("gradients", "factors"))
    gradients = 4 * 16384  # 2 (N - 1) / N = 1 for two replicas
    factors = 4 * 2 * 2 * (128 + 64 + 96 + 96)  # (m + n) r at r = 2
    agreement = 8 * (2 * 8 + 2 + 4)  # two numbers a matrix, the highest and lowest rate, four of the whole step
    assert full["bytes"] == gradients + agreement
    assert factors < thin["bytes"] < factors + 1000, "and small matrices to orthonormalize"
    assert 1 < full["bytes_seen_on_link"] / full["bytes"] < 1.3, "headers and acknowledgements"
    least = 8 * (gradients - slow_link.LEAST_BURST) / 1e6 * 1e3
    assert min(full["points"][0]["times_ms"]) > least, "no bandwidth but that of the bucket"
    assert full["points"][0]["bound_by"] == "link"
    assert full["points"][0]["predicted_ms"] > 8 * gradients / 1e6 * 1e3
    assert (tmp_path / "slow.png").read_bytes().startswith(b"\x89PNG")
