"""Something of every kind that a report shows, small, in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import orthoshard
from orthoshard.lab.canvas import svg
from orthoshard.lab.train.record import Record

RESULTS = Path(orthoshard.__file__).parents[2] / "benchmarks" / "results"
BENCHES = tuple(f"gpt2-small-{name}.json" for name in ("cpu-float32", "2-processes", "4-layers-4-owners", "slow-link"))
COMPARISON = RESULTS / "compare-shakespeare-tiny"
STEPS, TOKENS = 40, 512


def make_run(folder: Path, *, optimizer: str = "dion", speed: float = 1.0) -> Path:
    """The record of a run whose losses are known: 2 + exp(-speed · step / 10), training; 0.1 more, validation."""
    folder.mkdir(parents=True)
    record = Record(folder, new=True)
    config = {
        "model": {"name": "tiny"},
        "optimizer": {"name": optimizer, "lr": 0.01},
    }
    record({"kind": "run", "step": 0, "config": config, "parameters": 1234567, "data": {"name": "shakespeare"}})
    record({"kind": "validation", "step": 0, "loss": 3.1})
    for step in range(1, STEPS + 1):
        loss = 2 + math.exp(-speed * step / 10)
        event = {"kind": "step", "step": step, "loss": loss, "lr": 0.01, "tokens": TOKENS, "seconds": 0.5}
        record(event | {"optimizer_seconds": 0.1, "skipped": False})
        if step % 10 == 0:
            record({"kind": "validation", "step": step, "loss": loss + 0.1})
    record({"kind": "finished", "step": STEPS, "state_bytes": 4_000_000})
    record.close()
    return folder


def make_figure(folder: Path, name: str = "fig2") -> Path:
    """As a study writes it."""
    folder.mkdir(parents=True, exist_ok=True)

    def fill(figure):
        axes = figure.subplots()
        axes.plot([1, 2, 3], [3, 2, 1], marker="o", label="muon")
        axes.legend()

    (folder / f"{name}.svg").write_text(svg(fill, 4, 3))
    about = {"name": name, "kind": "curves", "title": "A figure", "caption": "What is seen.", "study": "paper.toml"}
    (folder / f"{name}.json").write_text(json.dumps(about | {"unfinished": ["width-64"], "missing": [], "data": {}}))
    return folder


def make_plan(path: Path, *arguments: str) -> Path:
    """As `orthoshard plan --json` writes it."""
    from orthoshard.lab.plan.cli import main

    flags = ["--model", "llama3.2-1b", "--mesh", "dp=2,fsdp=8", "--price", "2", "--ranks", "1/4", "--json", str(path)]
    assert main([*flags, *arguments]) == 0
    return path


def everything(folder: Path) -> list[Path]:
    """Paths for a report with all kinds of sections."""
    return [
        make_run(folder / "run-dion"),
        make_run(folder / "run-muon", optimizer="muon", speed=2.0),
        COMPARISON,
        make_figure(folder / "figures"),
        *(RESULTS / name for name in BENCHES),
        make_stages(folder / "stages.json"),
        make_check(folder / "check.json"),
        make_plan(folder / "plan.json"),
    ]


ABOUT = {"model": "gpt2-small", "torch": "2.13.0", "cpu": "AMD EPYC", "cores": 2, "threads": 1, "date": "2026-11-22"}


def make_stages(path: Path) -> Path:
    """As `orthoshard bench --stages` writes it."""
    stages = {"products": {"median_ms": 30.0, "share": 0.75}, "weights": {"median_ms": 10.0, "share": 0.25}}
    about = {**ABOUT, "model": {"name": "gpt2-small"}, "device": "cpu", "dtype": "float32", "within": 0.1}
    path.write_text(json.dumps(about | {"contestants": {"dion-1/4": {"step_median_ms": 40.0, "stages": stages}}}))
    return path


def make_check(path: Path) -> Path:
    """As `orthoshard plan --check --json` writes it."""
    rows = [
        {"processes": 1, "optimizer": "adamw", "predicted_ms": 62, "measured_ms": 50, "ratio": 1.24, "within": True},
        {"processes": 2, "optimizer": "muon", "predicted_ms": 300, "measured_ms": 150, "ratio": 2, "within": False},
    ]
    for row in rows:
        row["parts_ms"] = {"products": 40, "passes": 10, "wire": 0}
    path.write_text(json.dumps(ABOUT | {"rows": [row | {"machine": "Measured."} for row in rows]}))
    return path
