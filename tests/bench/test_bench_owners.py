"""``bench --processes`` and ``--owners``: two real processes, and what ends them."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
import torch.multiprocessing as mp

from orthoshard.lab.bench import cli, owners
from orthoshard.lab.bench.config import BenchConfig
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.lab.bench.processes import run_ranks
from processes import forkserver

TINY = ModelShapes("tiny", 2, ((24, 16), (16, 8)), "made up")


@pytest.fixture
def quick(monkeypatch):
    """Forked processes in place of spawned ones, which import torch each for themselves; and a small model."""
    monkeypatch.setattr(cli, "find_model", lambda name: TINY)
    forkserver()
    started = mp.start_processes
    monkeypatch.setattr(mp, "start_processes", lambda *a, **o: started(*a, **{**o, "start_method": "forkserver"}))


def test_a_step_cut_over_processes_beside_what_it_cannot_avoid(quick, tmp_path, capsys):
    out = tmp_path / "sharded.json"
    config = BenchConfig(processes=2, ranks=("0.5",), only=("*1/2",), rounds=2, threads=1, out=out)
    assert cli.run(config) == 0
    result = json.loads(out.read_text())
    assert (result["processes"], result["threads"]) == (2, 1)
    (row,) = result["contestants"].values()
    assert list(result["contestants"]) == ["dion-1/2"], "a pattern, as everywhere; and one name for 0.5 and 1/2"
    assert row["ratio"] == pytest.approx(row["sharded_ms"] / (row["one_process_ms"] + row["collectives_ms"]))
    assert {what: len(times) for what, times in row["times_ms"].items()} == {
        "one_process": 2,
        "sharded": 2,
        "collectives": 2,
    }
    products = 4 * 2 * (24 * 8 + 16 * 4)  # Dion's XQ by rows: 2 n r (N - 1) / N numbers, here of 2 ranks
    assert row["bytes"] > products / 2
    assert "over 2 gloo processes" in capsys.readouterr().out


def test_both_modes_step_alike_and_half_of_the_state_is_kept(quick, tmp_path, capsys):
    out = tmp_path / "owners.json"
    config = BenchConfig(owners=2, ranks=("1/2",), rounds=2, out=out)
    assert cli.run(config) == 0
    result = json.loads(out.read_text())
    assert list(result["contestants"]) == ["dion-1/2", "muon"]
    matrices = 4 * 2 * (24 * 16 + 16 * 8)
    bases = 4 * 2 * (24 * 8 + 16 * 4)
    for name, row in result["contestants"].items():
        everything = matrices + (bases if name == "dion-1/2" else 0)
        assert row["none"]["state"] == everything
        assert row["zero1"]["state"] == everything / 2
        assert row["difference"] < 1e-5
        assert len(row["zero1"]["times_ms"]) == 2
        assert row["ratio"] == pytest.approx(row["zero1"]["ms"] / row["none"]["ms"])
    shown = capsys.readouterr().out
    assert "tiny at 2 replicas" in shown
    assert "muon" in shown


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--owners", "1"], "--owners is 1; give 2 or more"),
        (["--owners", "2", "--only", "adamw-fused"], "'adamw-fused' matches no contestant; did you mean"),
        (["--processes", "2", "--only", "floor-muon"], "'floor-muon' matches no contestant; did you mean 'muon'"),
        (["--processes", "2", "--dtype", "bfloat16"], "--dtype does not go with --processes"),
        (["--owners", "2", "--stages"], "--owners and --stages do not go together"),
    ],
)
def test_what_cannot_be_is_refused_before_the_start(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(owners, "measure", lambda setting: pytest.fail("it started"))
    assert cli.main(["--model", "gpt2-small", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_ctrl_c_is_for_the_process_that_waits_and_ends_the_others(monkeypatch):
    """A terminal sends it to all: those that measure are deaf to it from their start."""
    heard, ended = [], []

    class Started:
        processes = [SimpleNamespace(terminate=lambda: ended.append(True))] * 2

        def join(self):
            raise KeyboardInterrupt

    def start(*_, **options):
        assert not options["join"]
        heard.append(signal.getsignal(signal.SIGINT))
        return Started()

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(mp, "start_processes", start)
    with pytest.raises(KeyboardInterrupt):
        run_ranks(print, (), 2)
    assert heard == [signal.SIG_IGN]
    assert ended == [True, True]
    assert signal.getsignal(signal.SIGINT) == before
