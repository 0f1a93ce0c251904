"""The installed package as a stranger has it: `python .ci/wheel.py`, by a Python that has torch and the wheel.
Of this checkout only the README is read. Needs no other package, and says what it ran on."""

import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import orthoshard

README = Path(__file__).resolve().parents[1] / "README.md"
RULES = ["Dion", "DionTail", "Muon", "NorMuon", "Dion3", "RowNorm"]


def trained(rule, shard):
    """Return the weights after three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.Linear(24, 32))
    shard(model)
    optimizer = getattr(orthoshard, rule)(model, lr=0.02)
    words = torch.arange(32).reshape(4, 8)
    for _ in range(3):
        nn.functional.cross_entropy(model(words).flatten(0, 1), words.flatten().roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def rank(number, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=timedelta(0, 60))
    for rule in RULES:
        alone = trained(rule, lambda model: None)
        sharded = trained(rule, lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))))
        for a, b in zip(alone, sharded, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, rule=rule: f"{rule}: {text}")
    dist.destroy_process_group()


def command(*words):
    run = subprocess.run([*words], capture_output=True, text=True, timeout=600)
    return run.returncode, run.stdout + run.stderr


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # not the checkout
        example = Path("example.py")
        example.write_text(re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)[0])
        runpy.run_path(str(example))
        mp.spawn(rank, (f"{folder}/store",), nprocs=2)
        code, text = command(str(Path(sys.executable).with_name("orthoshard")), "--help")
        assert "usage: orthoshard" in text * (code == 0), text
        code, text = command(sys.executable, "-m", "orthoshard", "plan", "--help")
        whole = code == 0 and "--mesh" in text
        assert whole or (code == 2 and "pip install 'orthoshard[lab]'" in text and "\n" not in text.strip()), text
    home = Path(orthoshard.__file__).parent
    assert (home / "py.typed").exists()
    print(
        f"orthoshard {metadata.version('orthoshard')} from {home}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, the commands {'with' if whole else 'without'} their packages: fine"
    )


if __name__ == "__main__":
    main()
