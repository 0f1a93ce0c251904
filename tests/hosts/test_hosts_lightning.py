"""Lightning: what the example's run leaves in its checkpoints."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed: pip install 'orthoshard[hosts]'")


def test_the_schedule_has_turned_and_the_checkpoint_holds_plain_values(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    importlib.import_module("lightning_module").main(["--out", str(tmp_path), "--steps", "50"])
    saved = torch.load(sorted(tmp_path.glob("*.ckpt"))[-1], weights_only=True)
    (optimizer,), (schedule,) = saved["optimizer_states"], saved["lr_schedulers"]
    rates = {group["role"]: group["lr"] for group in optimizer["param_groups"]}
    assert rates["matrix"] < 0.02, "ReduceLROnPlateau has never turned: the comparison of resumed runs would not see it"
    assert schedule["last_epoch"] > 5
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    assert len(names) == len(optimizer["state"]) == len(saved["state_dict"])
