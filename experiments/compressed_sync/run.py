"""Three trainings on replicas: torch averages gradients; the optimizer averages factors; that, killed and resumed on
another number of replicas. Their validation losses must agree.

    python experiments/compressed_sync/run.py [--steps 150] [--out experiments/compressed_sync]

Writes results.json: every validation loss of each run. Unclipped, for replicas with gradients of their own clip by a
bound of the norm.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(folder: Path, replicas: int, steps: int, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(replicas)]
    command += ["-m", "orthoshard", "train", "--dp", str(replicas), "--out", str(folder), *flags]
    if "--resume" not in flags:
        command += [
            "--model",
            "tiny",
            "--steps",
            str(steps),
            "--batch",
            "16",
            "--clip",
            "0",
            "--checkpoint-every",
            "20",
        ]
        command += ["--validate-every", "50", "--sample-tokens", "0", "--rank-fraction", "0.25", "--lr", "0.01"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def events(folder: Path) -> list[dict]:
    path = folder / "run.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"a run failed with {process.returncode}")


def killed_and_resumed(folder: Path, steps: int) -> None:
    process = start(folder, 2, steps, "--replica-sync", "factors")
    while sum(event["kind"] == "step" for event in events(folder)) < steps // 2:
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.2)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, workers)]:  # each worker is a session of its own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    finish(start(folder, 4, steps, "--resume"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in ("full", "factors", "killed")}
        finish(start(folders["full"], 2, given.steps))
        finish(start(folders["factors"], 2, given.steps, "--replica-sync", "factors"))
        killed_and_resumed(folders["killed"], given.steps)
        found = {
            name: {
                "validations": [[e["step"], e["loss"]] for e in events(folder) if e["kind"] == "validation"],
                "resumed_at": [e["step"] for e in events(folder) if e["kind"] == "resumed"],
            }
            for name, folder in folders.items()
        }
    last = {name: run["validations"][-1][1] for name, run in found.items()}
    spread = max(last.values()) - min(last.values())
    result = {"command": sys.argv, "steps": given.steps, "runs": found, "last": last, "spread": spread}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(last), "spread", spread)


if __name__ == "__main__":
    main()
